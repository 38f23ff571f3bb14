# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's tensors are found for each parameter, and what is added to parameters goes back to the tensors."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MixtralConfig

from llm_trainer.merge.weight_layout import WeightLayout

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def lay_out(folder, config) -> tuple[WeightLayout, dict[str, torch.Tensor], torch.nn.Module]:
    """Save a model: the layout of its checkpoint, the tensors there, and the model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return WeightLayout(skeleton, {name: tuple(tensor.shape) for name, tensor in tensors.items()}), tensors, model


def test_tensors_that_are_parameters_have_their_places(tmp_path):
    layout, tensors, _ = lay_out(tmp_path, LlamaConfig(**SIZES, tie_word_embeddings=False))
    assert layout.stored == {name: name for name in tensors}
    assert layout.places == {}
    name = "model.layers.0.self_attn.q_proj.weight"
    assert layout.find_group(name) == [name]


def test_names_are_found_with_and_without_the_prefix_of_the_body(tmp_path):
    layout, tensors, _ = lay_out(tmp_path, LlamaConfig(**SIZES, tie_word_embeddings=False))
    layout.shapes = {name.removeprefix("model."): tuple(tensor.shape) for name, tensor in tensors.items()}
    assert layout.find_stored_name("model.norm.weight") == "norm.weight"
    assert layout.find_stored_name("norm.weight") == "norm.weight"
    assert layout.find_stored_name("unknown") == "unknown"


@pytest.fixture
def experts(tmp_path):
    """A checkpoint of experts one by one, which are one parameter in the model."""
    return lay_out(tmp_path, MixtralConfig(**SIZES, num_local_experts=3))


def test_experts_are_rows_of_their_parameter(experts):
    layout, tensors, _ = experts
    stacked = [name for name in tensors if ".experts." in name]
    assert layout.places.keys() == set(stacked)
    assert {(place, number) for _, place, number in layout.places.values()} == {(0, 3), (1, 3), (2, 3)}
    assert not layout.stored.keys() & set(stacked)


def test_what_is_added_to_parameters_goes_back_to_the_tensors(experts):
    layout, tensors, model = experts
    parameter = "model.layers.0.mlp.experts.gate_up_proj"
    group = layout.find_group(parameter)
    assert parameter in group
    reverted = layout.revert({name: model.get_parameter(name).detach() for name in group})
    assert len(reverted) >= 6  # gate and up of three experts
    for name, value in reverted.items():
        assert torch.equal(value, tensors[name]), name
    shapes = layout.try_revert(group)
    assert shapes == {name: tuple(tensors[name].shape) for name in reverted}


def test_values_that_cannot_be_reverted_are_told(experts, monkeypatch):
    layout, _, _ = experts

    def fail(values):
        raise NotImplementedError("no way back")

    monkeypatch.setattr(layout, "revert", fail)
    with pytest.raises(ValueError, match="no way back"):
        layout.try_revert(["model.layers.0.mlp.experts.gate_up_proj"])
