# SPDX-License-Identifier: Apache-2.0
"""The plan of a merge names every tensor of the result, its type and its delta, and writes nothing."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from llm_trainer.common.errors import UserError
from llm_trainer.merge.plan import MergeRequest, plan_merge

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def merge_request(tmp_path) -> MergeRequest:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, tie_word_embeddings=False)).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(adapter)
    return MergeRequest(base, adapter, AutoConfig.from_pretrained(base), torch.bfloat16)


def test_every_tensor_is_planned_in_its_file_and_type(merge_request, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    plan = plan_merge(merge_request)
    (shard,) = plan.shards
    assert shard.file_name == "model.safetensors"
    assert {tensor.dtype for tensor in shard.tensors} == {torch.bfloat16}
    changed = [tensor.name for tensor in shard.tensors if tensor.delta is not None]
    assert changed == ["model.layers.0.self_attn.q_proj.weight"]
    assert not plan.is_untied
    assert sorted(tmp_path.rglob("*")) == before


def test_a_config_of_other_shapes_is_refused(merge_request):
    merge_request.config.intermediate_size = 48
    with pytest.raises(UserError, match=r"has shape \[\d+, \d+\], and config.json asks for \[\d+, \d+\]"):
        plan_merge(merge_request)
