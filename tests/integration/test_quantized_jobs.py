# SPDX-License-Identifier: Apache-2.0
"""Jobs on bases that are stored quantized, or that bitsandbytes quantizes."""

import json
import os
import shutil
import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM

from support.sagemaker_tree import LLM_TRAINER, metrics_of
from support.tiny_gpt_oss import build_tiny_gpt_oss
from support.waiting import GUARD_SECONDS

pytestmark = pytest.mark.long


@pytest.fixture
def gpt_oss_tree(tree):
    shutil.rmtree(tree.base_dir / "input/data/model")
    build_tiny_gpt_oss(tree.base_dir / "input/data/model")
    return tree


def test_an_mxfp4_checkpoint_is_trained_and_merged_to_whole_weights(gpt_oss_tree):
    tree = gpt_oss_tree
    tree.change(merge_weights="true")
    result = tree.run()
    assert result.returncode == 0, result.stdout
    assert "Quantization: the checkpoint's MXFP4 is dequantized to float32 for training: " in result.stdout
    assert "Attention: eager (auto: " in result.stdout
    losses = metrics_of(result.stdout, "train_loss")
    assert losses[-1] < losses[0]
    config = json.loads((tree.base_dir / "model/config.json").read_text())
    assert "quantization_config" not in config
    merged, base = (
        AutoModelForCausalLM.from_pretrained(tree.base_dir / name) for name in ("model", "input/data/model")
    )
    assert merged.dtype == torch.float32
    layers = [model.state_dict()["model.layers.0.mlp.experts.down_proj"].float() for model in (merged, base)]
    assert layers[0].shape == layers[1].shape


def test_an_adapter_on_int8_weights_is_merged(tree):
    tree.change(load_in_8bit="true", merge_weights="true", gradient_checkpointing="true")
    result = tree.run()
    assert result.returncode == 0, result.stdout
    assert "Quantization: LLM.int8(): 52% of the weights, as the others stay in float32" in result.stdout
    losses = metrics_of(result.stdout, "train_loss")
    assert losses[-1] < losses[0]
    assert "quantization_config" not in json.loads((tree.base_dir / "model/config.json").read_text())


def test_a_contradiction_to_the_checkpoint_is_told_by_train_and_validate_before_the_data_are_read(gpt_oss_tree):
    tree = gpt_oss_tree
    tree.change(load_in_4bit="true")
    result = tree.run()
    assert result.returncode == 1
    assert tree.failure.startswith("load_in_4bit=true: ")
    assert "is stored in mxfp4 already, and a base has one quantization: remove load_in_4bit." in tree.failure
    assert "Data train" not in result.stdout
    environment = {**os.environ, "SAGEMAKER_BASE_DIR": str(tree.base_dir)}
    command = [str(LLM_TRAINER), "validate", "--json"]
    validated = subprocess.run(command, env=environment, stdout=subprocess.PIPE, timeout=GUARD_SECONDS, check=False)
    (problem,) = json.loads(validated.stdout)["problems"]
    assert tree.failure.startswith(problem)
