# SPDX-License-Identifier: Apache-2.0
"""Fused LoRA layers beside PEFT's: the same gradients, nearer to float64's in 16 bit, and fewer kernels and bytes."""

import copy

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, Qwen2Config

from llm_trainer.model.layers.fused_adapters import fuse_adapters, is_fusable
from llm_trainer.model.precision import set_adapter_types

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
LLAMA = LlamaConfig(**SIZES)
BIASES = Qwen2Config(**SIZES)  # of q, k and v
TOKENS = torch.arange(48).reshape(2, 24) % 128
CASES = {"plain": (LLAMA, False), "biases": (BIASES, False), "4 bit": (LLAMA, True)}


def adapt(folder, dtype, in_4bit=False, **options):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype) if in_4bit else None
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=quantization)
    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 12, "init_lora_weights": False, "target_modules": "all-linear", **options}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)  # of the base's size, so that both count and rounding stays small
    set_adapter_types(model)
    return model


def fuse(model):
    fused = copy.deepcopy(model)
    fuse_adapters(fused)
    return fused


def compute(model, autocast=None):
    """Return the loss and the gradients, in the types that they have."""
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def as_float64(model):
    """The same weights in float64, those in 4 bit unpacked."""
    exact = copy.deepcopy(model)
    for layer in exact.modules():
        if type(layer).__name__ == "Linear4bit" and hasattr(layer, "base_layer"):
            packed = layer.base_layer
            plain = nn.Linear(packed.in_features, packed.out_features, bias=False)
            plain.weight = nn.Parameter(dequantize_4bit(packed.weight.data, packed.weight.quant_state), False)
            layer.base_layer = plain
    return exact.double()


def measure(found, exact):
    """Return the distance of all gradients, relative to the exact ones' length."""
    differences = [(found[name].double() - exact[name]).square().sum() for name in exact]
    return (sum(differences) / sum(each.square().sum() for each in exact.values())).sqrt().item()


def test_a_layers_output_may_be_changed_in_place():
    """As Gemma 3n does."""
    torch.manual_seed(0)
    plain = get_peft_model(nn.Sequential(nn.Linear(8, 4)), LoraConfig(target_modules=["0"], init_lora_weights=False))
    fused, x = fuse(plain), torch.randn(2, 3, 8)
    for model in (plain, fused):
        out = model(x)
        out += 1
        out[..., 0] *= 3
        out.square().sum().backward()
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("recomputes", [False, True])
def test_gradients_are_the_same_in_float32(make_base, case, recomputes):
    config, in_4bit = CASES[case]
    plain = adapt(make_base(config), torch.float32, in_4bit)
    if recomputes:
        plain.gradient_checkpointing_enable({"use_reentrant": False})
        plain.enable_input_require_grads()
    fused = fuse(plain)
    expected, found = compute(plain), compute(fused)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1].keys() == expected[1].keys() != set()
    assert measure(found[1], {name: each.double() for name, each in expected[1].items()}) < 1e-6


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_16_bit_is_as_near_to_the_exact_one(make_base, case, dtype):
    """The other layers' roundings decide most, by chance for one or the other: a quarter bounds that."""
    config, in_4bit = CASES[case]
    plain = adapt(make_base(config), dtype, in_4bit)
    fused, exact = fuse(plain), as_float64(plain)
    expected, found, truth = compute(plain, dtype), compute(fused, dtype), compute(exact)
    assert measure(found[1], truth[1]) <= 1.25 * measure(expected[1], truth[1])
    assert all(gradient.dtype == torch.float32 for gradient in found[1].values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [16, 12])  # a scaling of two, and of one and a half, which rounds
def test_a_layer_in_16_bit_is_nearer_to_the_exact_one(dtype, alpha):
    """PEFT rounds base, product, scaled product and sum, each for itself. A product that adds rounds their sum once."""
    distances = []
    for seed in range(4):
        plain = make_layer(dtype, alpha, seed)
        fused, exact = fuse(plain), copy.deepcopy(plain).double()
        x, gradient = torch.randn(256, 96).to(dtype), torch.randn(256, 160).to(dtype)
        results = [run_layer(model, x, gradient, dtype) for model in (plain, fused)]
        truth = run_layer(exact, x.double(), gradient.double(), None)
        distances.append([[find_distance(*pair) for pair in zip(found, truth, strict=True)] for found in results])
    of_peft, of_fused = torch.tensor(distances).mean(dim=0)  # of output, and gradients of input, A and B
    assert (of_fused <= 1.001 * of_peft).all()
    assert (of_fused[:2] < 0.93 * of_peft[:2]).all()


def make_layer(dtype, alpha, seed):
    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=alpha, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(96, 160)).to(dtype), config)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data.normal_(std=0.2)
    set_adapter_types(model)
    return model


def run_layer(model, x, gradient, dtype):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        out = model(x)
    out.backward(gradient)
    return [out, x.grad, *(weight.grad for weight in model.parameters() if weight.requires_grad)]


def find_distance(found, truth):
    return ((found.double() - truth).norm() / truth.norm()).item()


MEMORY = ("aten::detach", "aten::_unsafe_view", "aten::empty_strided", "aten::new_empty")  # run no kernel


class Traffic(TorchDispatchMode):
    """The operations that run a kernel, and the bytes that they read and write."""

    def __init__(self):
        super().__init__()
        self.kernels = self.num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs, out)) if isinstance(each, torch.Tensor)]
        is_view = any(alias.alias_info and not alias.alias_info.is_write for alias in function._schema.arguments)
        if not (is_view or function._schema.name in MEMORY):
            self.kernels += 1
            self.num_bytes += sum(each.nbytes for each in tensors)
        return out


def trace_layer(fuses, dropout=0.0, casts=False):
    """Return the traffic of a decoder layer's adapted layers: an 8B Llama's with r=16, all sizes a sixteenth of it."""
    hidden, heads, inner, tokens = 256, 64, 896, 512
    shapes = [(hidden, hidden), (hidden, heads), (hidden, heads), (hidden, hidden), (hidden, inner), (hidden, inner)]
    base = nn.Sequential(*(nn.Linear(*shape, bias=False) for shape in [*shapes, (inner, hidden)])).bfloat16()
    config = LoraConfig(r=1, target_modules=[str(number) for number in range(7)], lora_dropout=dropout)
    model = get_peft_model(base, config).train()
    if not casts:
        set_adapter_types(model)
    if fuses:
        fuse_adapters(model)
    layers = list(model.base_model.model)
    inputs = [torch.randn(tokens, layer.in_features).bfloat16().requires_grad_() for layer in layers]
    gradients = [torch.randn(tokens, layer.out_features).bfloat16() for layer in layers]
    with Traffic() as traffic:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
        torch.autograd.backward(outputs, gradients)
    return traffic


def test_kernels_and_bytes_of_a_decoder_layer():
    """The rest of such a layer, of norms, rotation, activation and attention, has none of these kernels."""
    first, peft, fused = trace_layer(False, 0.1, casts=True), trace_layer(False), trace_layer(True)
    assert (first.kernels, peft.kernels, fused.kernels) == (175, 112, 84)
    assert fused.kernels <= 0.6 * first.kernels
    assert fused.num_bytes <= 0.25 * first.num_bytes
    assert fused.num_bytes <= 0.63 * peft.num_bytes


def test_a_layer_keeps_its_input_once_and_what_is_small():
    kept = {}
    layer = fuse(make_layer(torch.bfloat16, 16, seed=0))
    x = torch.randn(256, 96).bfloat16().requires_grad_()

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert sum(kept.values()) == 2 * (256 * 96 + 256 * 8 + 8 * 96 + 160 * 8)  # input, inner product, A, B


def test_an_input_without_gradient_needs_no_product_with_the_base():
    layer = fuse(make_layer(torch.float32, 16, seed=0))
    products = []
    layer.base_model.model[0].base_layer.multiply_back = products.append
    layer(torch.randn(3, 5, 96)).sum().backward()
    assert products == []


OTHERS = {
    "dropout": {"lora_dropout": 0.1},
    "dora": {"use_dora": True},
    "bias of B": {"lora_bias": True},
}


@pytest.mark.parametrize("case", OTHERS)
def test_layers_that_compute_something_else_are_left_to_peft(case):
    base = nn.Sequential(nn.Linear(8, 8))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], **OTHERS[case]))
    assert not is_fusable(model.base_model.model[0])


def test_the_adapter_can_be_switched_off_merged_and_added_to():
    model = make_layer(torch.float32, 16, seed=0)
    fused, x = fuse(model), torch.randn(3, 96)
    adapted = model(x)
    with fused.disable_adapter(), model.disable_adapter():
        assert torch.equal(fused(x), model(x))
    torch.testing.assert_close(fused(x), adapted)
    fused.merge_adapter()
    torch.testing.assert_close(fused(x), adapted)
    fused.unmerge_adapter()
    for each in (model, fused):
        torch.manual_seed(1)
        each.add_adapter("second", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        each.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(fused(x), model(x))


def test_without_autocast_an_adapter_in_float32_computes_as_peft_does():
    model = make_layer(torch.bfloat16, 16, seed=0).eval()
    x = torch.randn(3, 96).bfloat16()
    with torch.no_grad():
        assert torch.equal(fuse(model)(x), model(x))
