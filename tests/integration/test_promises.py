# SPDX-License-Identifier: Apache-2.0
"""The promises of a job in one small one: two ranks with FSDP2, a tracker that dies, a stop, a resumed run, a merge.

Each is tested in depth by the long tests. What two ranks learn without FSDP2 is tested in test_jobs.py.
"""

import signal

import torch
from transformers import AutoModelForCausalLM

from support.mlflow_server import MlflowServer
from support.sagemaker_tree import metrics_of


def test_a_sharded_job_outlives_its_tracker_is_stopped_goes_on_and_is_merged(tree, start, tmp_path):
    tree.environment["OMP_NUM_THREADS"] = "1"
    tree.change(distribution="fsdp", nproc_per_node="2", num_train_epochs="100000", save_steps="100000")
    server = MlflowServer(tmp_path).start()
    try:
        tree.change(mlflow_uri=server.uri)
        job = start(tree)
        job.wait_for("MLflow: run")
    finally:
        server.stop()
    job.wait_for("Warning: MLflow does not take the metrics")
    job.wait_for("train_loss=")  # and the training goes on
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 0, job.log
    assert tree.manifest["stopped"]
    assert not (tree.base_dir / "output/failure").exists()
    (step,) = tree.checkpoints
    assert step == tree.manifest["num_steps"] == metrics_of(job.log, "step")[-1]
    shards = (tree.base_dir / f"checkpoints/checkpoint-{step}/optimizer_0").glob("*.distcp")
    assert len(list(shards)) == 2
    assert {"adapter_model.safetensors", "adapter_config.json"} <= tree.model_files

    tree.change(max_steps=str(step + 2), mlflow_uri=None, merge_weights="true")
    result = tree.run()
    assert result.returncode == 0, result.stdout
    assert f"Resuming from {tree.base_dir}/checkpoints/checkpoint-{step}" in result.stdout
    assert len(metrics_of(result.stdout, "train_loss")) == 2
    assert tree.manifest["num_steps"] == step + 2
    assert not tree.manifest["stopped"]
    assert tree.manifest["export"]["checks"][1]["relative_logit_difference"] < 1e-4
    model = AutoModelForCausalLM.from_pretrained(tree.base_dir / "model")
    assert model(input_ids=torch.arange(3, 40)[None]).logits.isfinite().all()
