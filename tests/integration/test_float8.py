# SPDX-License-Identifier: Apache-2.0
"""Whole jobs with `base_compute=fp8`, whose products a CPU emulates where `steered.py` lets it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from support.sagemaker_tree import RunningJob, metrics_of

pytestmark = pytest.mark.long

STEERED = Path(__file__).parents[1] / "gpu/steered.py"
SETTINGS = {"base_compute": "fp8", "save_steps": "2", "sample_prompts": "1"}


def start(tree):
    return RunningJob(
        subprocess.Popen(
            [sys.executable, str(STEERED), "float8", "train"],
            env={**os.environ, "SAGEMAKER_BASE_DIR": str(tree.base_dir)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    )


def adapter_of(tree):
    weights = load_file(tree.base_dir / "model/adapter/adapter_model.safetensors")
    return {name: tensor.tolist() for name, tensor in weights.items()}


def test_a_job_in_float8_is_proven_and_merged_and_goes_on_after_a_stop_with_the_very_same_weights(make_tree):
    whole, stopped = (make_tree() for _ in range(2))
    for tree in (whole, stopped):
        tree.change(**SETTINGS, merge_weights="true")
    job = start(whole)
    assert job.end() == 0, job.log
    assert "float8: 14 of 14 linear layers multiply in float8" in job.log
    losses = metrics_of(job.log, "train_loss")
    assert losses[-1] < losses[0]
    export = whole.manifest["export"]
    assert export["proven"]
    differences = {check["what"]: check["relative_logit_difference"] for check in export["checks"]}
    assert differences["The adapter on its base"] < 1e-4 < differences["The adapter on its base without float8"]
    assert differences["The merged model"] < 1e-4

    job = start(stopped)
    job.wait_for("; step=2;")
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 0, job.log
    assert stopped.manifest["stopped"]
    job = start(stopped)
    assert job.end() == 0, job.log
    assert "Resuming from" in job.log
    assert adapter_of(stopped) == adapter_of(whole)


def test_without_a_gpu_it_is_refused(make_tree):
    tree = make_tree()
    tree.change(base_compute="fp8")
    assert tree.run().returncode == 1
    assert tree.failure.startswith("base_compute=fp8 needs an NVIDIA GPU of compute capability 8.9 or later")
