# SPDX-License-Identifier: Apache-2.0
"""Deltas on parameters are those on the checkpoint's tensors, and tied embeddings part where an adapter parts them."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from llm_trainer.common.errors import UserError
from llm_trainer.merge.base_tensors import CopiedTensor, StoredTensor
from llm_trainer.merge.delta_mapping import map_deltas_to_tensors, split_tied_embeddings
from llm_trainer.merge.lora_deltas import LowRankDelta, PeftMerge
from llm_trainer.merge.weight_layout import WeightLayout

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
EMBEDDINGS, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
DOWN = "model.layers.0.mlp.experts.down_proj"


def build_layout(config, folder) -> WeightLayout:
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    with torch.device("meta"):
        return WeightLayout(AutoModelForCausalLM.from_config(config), shapes)


def build_delta(*shape: int) -> LowRankDelta:
    *stack, rows, columns = shape
    return LowRankDelta(torch.randn(*stack, rows, 2), torch.randn(*stack, 2, columns), 0.5)


def test_a_plain_parameters_delta_is_its_tensors(tmp_path):
    layout, delta = build_layout(LlamaConfig(**SIZES), tmp_path), build_delta(16, 16)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert dict(map_deltas_to_tensors(layout, {name: delta})) == {name: delta}


def test_a_delta_on_fused_experts_goes_to_each_experts_tensor(tmp_path):
    layout, delta = build_layout(MixtralConfig(**SIZES, num_local_experts=3), tmp_path), build_delta(3, 16, 32)
    deltas = dict(map_deltas_to_tensors(layout, {DOWN: delta}))
    assert len(deltas) == 3
    whole = delta.scale * delta.left @ delta.right
    for name, own in deltas.items():
        rows = own.add_to(torch.zeros(layout.shapes[name]), 0, layout.shapes[name][0])
        torch.testing.assert_close(rows, whole[layout.places[name][1]])


def test_a_delta_that_only_peft_can_merge_is_refused_on_converted_parameters(tmp_path):
    layout = build_layout(MixtralConfig(**SIZES, num_local_experts=3), tmp_path)
    with pytest.raises(UserError, match="in another form, which DoRA cannot be merged into"):
        list(map_deltas_to_tensors(layout, {DOWN: PeftMerge(None)}))


@pytest.mark.parametrize(("same", "is_untied"), [(True, False), (False, True)])
def test_tied_embeddings_stay_tied_where_both_change_alike(same, is_untied, tmp_path):
    layout = build_layout(LlamaConfig(**SIZES, tie_word_embeddings=True), tmp_path)
    stored = layout.stored[EMBEDDINGS]
    tensors = {stored: StoredTensor(stored, tmp_path / "model.safetensors", torch.float32, (64, 16), 0)}
    first = build_delta(64, 16)
    deltas = {EMBEDDINGS: first, OUTPUT: first if same else build_delta(64, 16)}
    assert split_tied_embeddings(layout, tensors, deltas, {}) is is_untied
    assert (OUTPUT in deltas) is is_untied
    assert [isinstance(tensor, CopiedTensor) for tensor in tensors.values()] == (
        [False, True] if is_untied else [False]
    )
    assert (layout.shapes.get(OUTPUT) == (64, 16)) is is_untied


def test_embeddings_that_no_adapter_changes_stay_tied(tmp_path):
    layout = build_layout(LlamaConfig(**SIZES, tie_word_embeddings=True), tmp_path)
    assert not split_tied_embeddings(layout, {}, {}, {})
