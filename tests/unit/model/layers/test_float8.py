# SPDX-License-Identifier: Apache-2.0
"""Products in float8: their rounding is that of three bits of mantissa, and nothing else changes.

A number is off by up to a half of its last place, 2^-4 of it. Numbers that are spread evenly over a power of two, by
their logarithm, are off by sqrt((1/8)^2 / 12 * (1 - 1/4) / (2 ln 2)) = 2.65 %, root mean square. A sum of independent
products whose sides are both rounded keeps sqrt(2) times as much.
"""

import copy
import gc
import math
import weakref

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3MoeConfig

from llm_trainer.common.errors import UserError
from llm_trainer.model.device import Device
from llm_trainer.model.layers import float8
from llm_trainer.model.layers.float8 import Float8Linear, check_float8, convert_base, scale_rows
from llm_trainer.model.layers.fused_adapters import fuse_adapters
from llm_trainer.model.lora import list_trained_layers

ROUNDING = math.sqrt(1 / 8**2 / 12 * (1 - 1 / 4) / (2 * math.log(2)))  # of a number, root mean square
OF_A_PRODUCT = math.sqrt(2) * ROUNDING
SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
TOKENS = torch.arange(48).reshape(2, 24) % 128


def adapt(config, **options):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    names = list_trained_layers(base)
    given = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM", **options}
    return get_peft_model(base, LoraConfig(**given)).train(), names


def list_converted(model):
    return [name for name, layer in model.named_modules() if isinstance(layer, Float8Linear)]


def make_layer(num_in=512, num_out=256):
    torch.manual_seed(0)
    return nn.Linear(num_in, num_out).requires_grad_(False)


def measure(found, exact):
    """The distance, relative to the exact length; and the share of the exact one that is found."""
    return ((found - exact).norm() / exact.norm()).item(), ((found * exact).sum() / exact.square().sum()).item()


def test_a_layers_output_may_be_changed_in_place():
    layer, x = Float8Linear(make_layer()), torch.randn(2, 3, 512, requires_grad=True)
    out = layer(x)
    out += 1
    out.sum().backward()
    expected = layer.multiply_back(torch.ones(6, 256)).view(2, 3, 512)
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_numbers_are_rounded_to_three_bits_whatever_their_size(size):
    matrix = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)) * size
    numbers, scales = scale_rows(matrix)
    found = numbers.float() * scales
    errors = ((found - matrix) / matrix)[matrix.abs() > matrix.abs().amax() / 2**10]
    assert errors.abs().max() <= 2**-4
    assert errors.square().mean().sqrt() == pytest.approx(ROUNDING, rel=0.03)
    assert abs(errors.mean()) < 2e-3  # no bias
    torch.testing.assert_close(found.abs().amax(1), matrix.abs().amax(1))  # a row's largest number is kept


def test_rows_of_zeros_stay_and_what_is_no_number_is_seen():
    rows = torch.zeros(3, 16)
    rows[1, 2], rows[2, 3] = math.inf, math.nan
    numbers, scales = scale_rows(rows)
    assert not numbers[0].float().any()
    assert scales[0] > 0
    assert not (numbers[1:].float() * scales[1:]).isfinite().all(1).any()


def test_a_layer_rounds_as_its_numbers_do_in_both_passes_and_without_bias():
    layer = make_layer()
    converted = Float8Linear(layer)
    x = torch.randn(4, 64, 512, requires_grad=True)
    found = converted(x)
    gradient = torch.randn_like(found)
    (found_gradient,) = torch.autograd.grad(found, x, gradient)
    for found_part, exact in (
        (found - layer.bias, x @ layer.weight.t()),
        (found_gradient, gradient @ layer.weight),
    ):
        distance, share = measure(found_part.detach(), exact.detach())
        assert distance == pytest.approx(OF_A_PRODUCT, rel=0.05)
        assert share == pytest.approx(1, abs=2e-3)


def test_gradients_in_e5m2_would_be_twice_as_coarse(monkeypatch):
    layer = make_layer()
    gradient = torch.randn(256, 256)
    errors = []
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        monkeypatch.setattr(float8, "FLOAT8", dtype)
        monkeypatch.setattr(float8, "LARGEST", torch.finfo(dtype).max)
        numbers, scales = scale_rows(gradient)
        errors.append(measure((numbers.float() * scales) @ layer.weight, gradient @ layer.weight)[0])
    assert errors[1] / errors[0] == pytest.approx(2, rel=0.05)


def test_a_layer_keeps_no_input_and_two_bytes_a_weight():
    layer = make_layer()
    original = weakref.ref(layer.weight)
    converted = Float8Linear(layer)
    layer.weight = None
    gc.collect()
    assert original() is None
    kept = [*converted.parameters(), *converted.buffers()]
    num_bytes = sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in kept}.values())
    assert num_bytes == 2 * 512 * 256 + 4 * (512 + 256) + 4 * 256  # both copies, their scales and the bias
    saved = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor), lambda _: None):
        converted(torch.randn(2, 512, requires_grad=True))
    assert saved == []


@pytest.mark.parametrize("config", [LlamaConfig(**SIZES), Qwen2Config(**SIZES)], ids=["plain", "biases"])
@pytest.mark.parametrize("recomputes", [False, True])
def test_adapters_are_added_within_the_product_too(config, recomputes):
    plain, names = adapt(config)
    convert_base(plain, names)
    fused = copy.deepcopy(plain)
    fuse_adapters(fused)
    gradients = []
    for model in (plain, fused):
        if recomputes:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    # Numbers that differ in their last bits may be rounded to different neighbours.
    assert measure(*gradients)[0] < ROUNDING


def test_all_layers_of_the_decoder_are_converted_targeted_or_not_and_the_same_way_each_time():
    model, names = adapt(LlamaConfig(**SIZES), target_modules=["q_proj", "down_proj", "lm_head"])
    again = copy.deepcopy(model)
    assert convert_base(model, names) == "float8: 14 of 14 linear layers multiply in float8"
    assert len(list_converted(model)) == 14
    assert not any("lm_head" in name for name in list_converted(model))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in again.parameters())
    convert_base(again, names)
    for (name, ours), (_, others) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(ours.float(), others.float()), name


def test_layers_that_a_gpu_could_not_multiply_or_that_are_trained_stay():
    config = LlamaConfig(**{**SIZES, "intermediate_size": 120})
    model, names = adapt(config, target_modules=["q_proj"], modules_to_save=["o_proj"])
    assert convert_base(model, names) == "float8: 6 of 14 linear layers multiply in float8"  # q, k and v
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()


def test_experts_stay_and_a_line_says_so():
    sizes = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    model, names = adapt(Qwen3MoeConfig(**sizes), target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    line = convert_base(model, names)
    assert line == "float8: 8 of 8 linear layers multiply in float8; 4 stacks of experts do not"
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()


def test_ranks_send_each_other_no_float8(tmp_path):
    model, names = adapt(LlamaConfig(**SIZES))
    convert_base(model, names)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)  # gloo knows no float8
        wrapped(input_ids=TOKENS, labels=TOKENS).loss.backward()
        # Its end waits for gloo's threads if no one else holds the group, and they may wait for this one.
        del wrapped
        gc.collect()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("capability", "dtype", "words"),
    [
        (None, torch.bfloat16, "capability 8.9 or later"),
        ((8, 6), torch.bfloat16, "capability 8.9 or later"),
        ((9, 0), torch.float16, "the job computes in float16"),
    ],
)
def test_a_device_that_cannot_is_refused(capability, dtype, words):
    with pytest.raises(UserError, match=words):
        check_float8(Device(torch.device("cpu"), "a device", capability), dtype)


def test_a_product_is_tried_before_a_job_relies_on_it(monkeypatch):
    check_float8(Device(torch.device("cpu"), "a device", (9, 0)), torch.bfloat16)

    def fail(*_):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(float8, "multiply", fail)
    with pytest.raises(UserError, match="cannot multiply in float8 here"):
        check_float8(Device(torch.device("cpu"), "a device", (9, 0)), torch.bfloat16)
