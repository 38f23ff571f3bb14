# SPDX-License-Identifier: Apache-2.0
"""Changes of an adapter, rows of them by rows, are those that PEFT's own layers make."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from llm_trainer.common.errors import UserError
from llm_trainer.merge.lora_deltas import BiasDelta, LowRankDelta, list_deltas, list_replaced
from llm_trainer.model.adapter_file import attach_adapter

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, attention_bias=True
)


def make_adapter(folder, **options):
    """Save an adapter of random values; the adapted model."""
    torch.manual_seed(0)
    options = {"target_modules": ["q_proj"], "r": 2, "lora_alpha": 3, **options}
    model = get_peft_model(AutoModelForCausalLM.from_config(CONFIG), LoraConfig(task_type="CAUSAL_LM", **options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    model.save_pretrained(folder)
    return model


def attach(folder) -> PeftModel:
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(CONFIG)
    return attach_adapter(skeleton, folder)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_a_change_is_what_peft_merges(tmp_path, options):
    adapted = make_adapter(tmp_path, **options)
    layer = adapted.get_base_model().model.layers[0].self_attn.q_proj
    base = layer.get_base_layer().weight.detach().clone()
    layer.merge()
    ((name, delta),) = list_deltas(attach(tmp_path))
    assert name == "model.layers.0.self_attn.q_proj.weight"
    assert delta.is_whole is ("use_dora" in options)
    torch.testing.assert_close(delta.add_to(base.clone(), 0, 16), layer.get_base_layer().weight, rtol=0, atol=1e-5)
    if not delta.is_whole:
        rows = delta.add_to(base[4:7].clone(), 4, 7)
        torch.testing.assert_close(rows, layer.get_base_layer().weight[4:7], rtol=0, atol=1e-5)


def test_experts_are_rows_of_a_stack():
    left, right, weight = torch.randn(3, 4, 2), torch.randn(3, 2, 5), torch.randn(3, 4, 5)
    delta = LowRankDelta(left, right, 2.0)
    expected = weight + 2.0 * left @ right
    torch.testing.assert_close(delta.add_to(weight[1:3].clone(), 1, 3), expected[1:3])


def test_the_same_change_is_known_as_such():
    delta = LowRankDelta(torch.ones(2, 1), torch.ones(1, 2), 1.0)
    assert delta.equals(LowRankDelta(torch.ones(2, 1), torch.ones(1, 2), 1.0))
    assert not delta.equals(LowRankDelta(torch.ones(2, 1), torch.ones(1, 2), 2.0))
    assert not delta.equals(LowRankDelta(torch.ones(2, 1), torch.zeros(1, 2), 1.0))
    assert not delta.equals(BiasDelta(torch.ones(2)))


def test_a_bias_of_the_adapter_goes_onto_that_of_the_base(tmp_path):
    make_adapter(tmp_path, lora_bias=True)
    deltas = dict(list_deltas(attach(tmp_path)))
    bias = deltas["model.layers.0.self_attn.q_proj.bias"]
    (stored,) = (tensor for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items() if "bias" in name)
    torch.testing.assert_close(bias.add_to(torch.ones(3), 2, 5), 1 + 1.5 * stored[2:5])  # alpha / r


def test_saved_modules_come_whole_and_the_base_stays_a_placeholder(tmp_path):
    adapted = make_adapter(tmp_path, modules_to_save=["lm_head"])
    replaced = list_replaced(attach(tmp_path))
    assert replaced.keys() == {"lm_head.weight"}
    trained = adapted.get_base_model().lm_head.modules_to_save["default"].weight
    torch.testing.assert_close(replaced["lm_head.weight"], trained.detach())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda tensor: tensor[:, :-1].contiguous(),
            r"lora_A.weight has shape \[2, 15\], and the base needs \[2, 16\]",
        ),
        (lambda tensor: tensor.fill_(float("nan")), "holds numbers that are not finite: the training diverged"),
        (lambda tensor: None, r"lacks .*lora_A.weight, of shape \[2, 16\]: give the base"),
    ],
    ids=["shape", "nan", "missing"],
)
def test_an_adapter_that_does_not_fit_is_told_with_its_tensor(tmp_path, change, words):
    make_adapter(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {name: change(tensor) if "lora_A" in name else tensor for name, tensor in load_file(file).items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
    with pytest.raises(UserError, match=words):
        attach(tmp_path)
