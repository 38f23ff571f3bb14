# SPDX-License-Identifier: Apache-2.0
"""An adapter that moves a part of the base, in whole jobs: the resumed one ends as the other, on the base as it is."""

import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from support.sagemaker_tree import metrics_of

pytestmark = pytest.mark.long


def test_pissa_with_loraplus_is_resumed_exactly_and_its_adapter_is_the_bases_own(tree):
    tree.change(init_lora_weights="pissa_niter_16", loraplus_lr_ratio="4", lora_r="2")
    tree.change(nproc_per_node="2", per_device_train_batch_size="4", save_steps="2", merge_weights="true")
    model, checkpoints = tree.base_dir / "model", tree.base_dir / "checkpoints"
    result = tree.run()
    assert result.returncode == 0, result.stdout
    losses = metrics_of(result.stdout, "train_loss")
    assert losses[-1] < losses[0]
    assert "Adapter on 2 x self_attn.q_proj, " in result.stdout
    assert tree.manifest["adapter"]["targets"]["mlp.down_proj"] == 2
    assert 0 < tree.manifest["trainable_parameters"] < tree.manifest["parameters"]

    weights = (model / "model.safetensors").read_bytes()
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tree.base_dir / "input/data/model"), tree.base_dir / "model/adapter"
    )
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(model)(input_ids=tokens).logits
        torch.testing.assert_close(adapted(input_ids=tokens).logits, merged, rtol=0, atol=1e-5)

    shutil.rmtree(checkpoints / "checkpoint-4")
    result = tree.run()
    assert result.returncode == 0, result.stdout
    assert f"Resuming from {checkpoints / 'checkpoint-2'}" in result.stdout
    assert (model / "model.safetensors").read_bytes() == weights
