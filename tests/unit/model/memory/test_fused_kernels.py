# SPDX-License-Identifier: Apache-2.0
"""Stand-ins hold what Liger's own autograd functions hold, layer by layer, and what follows from first principles.

Liger's Python code runs on tensors without numbers; only the launches of its Triton kernels are left out.
"""

import contextlib
import copy
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from llm_trainer.config.schema import Settings
from llm_trainer.model.liger import LEFT_OUT
from llm_trainer.model.memory import fused_kernels, shape
from llm_trainer.model.memory.step_trace import Step, StepTrace, trace_step
from support.liger_families import build_families

SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
FAMILIES = build_families(num_experts=4, window=64, **SIZES)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj"]
METHODS = {
    "lora": ({"lora_r": 16, "lora_dropout": 0.0}, torch.bfloat16),
    "lora with dropout": ({"lora_dropout": 0.1, "target_modules": LINEAR}, torch.bfloat16),
    "qlora": ({"lora_dropout": 0.0, "load_in_4bit": True}, torch.bfloat16),
    "all weights": ({"use_peft": False}, torch.float32),
}
ALL = frozenset({"rope", "rms_norm", "swiglu", "geglu"})
LENGTH = 512
STEP = Step(
    num_sequences=1,
    length=LENGTH,
    has_mask=False,
    stores_scores=False,
    compute_dtype=torch.bfloat16,
    recompute_activations=False,
    offload_activations=False,
    sharded=False,
    on_gpu=True,
    fused_kernels=ALL,
)


def trace(name: str, method: str, **step) -> StepTrace:
    options, dtype = METHODS[method]
    if name == "phi3" and "target_modules" in options:
        options = {**options, "target_modules": ["qkv_proj", "o_proj"]}
    settings = Settings(**options)
    read = shape.read_shape(copy.deepcopy(FAMILIES[name]), settings.model, settings.adapter, dtype)
    return trace_step(read, replace(STEP, **step))


@pytest.fixture
def liger(monkeypatch):
    """Have skeletons get Liger's own code in the place of the stand-ins."""
    from liger_kernel import transformers
    from liger_kernel.backends import registry
    from liger_kernel.ops import fused_moe
    from triton.runtime.jit import KernelInterface

    for name in list(registry._DISCOVERY_MAP):  # a failed import in the forward pass would keep its tensors
        registry._discover(name)

    def route(chosen, num_experts, *_):
        """The tables of routing, whose lengths Liger reads from the device: a tile for each 128 rows."""
        rows, num_tiles = chosen.numel(), chosen.numel() // 128
        lengths = (num_experts, num_experts + 1, rows, rows, rows, num_tiles, num_tiles)
        return tuple(torch.empty(length, dtype=torch.int32) for length in lengths)

    build = shape.build_on_meta

    def build_with_liger(*arguments):
        base = build(*arguments)
        code = sys.modules[type(base).__module__]
        for name, plain in list(vars(code).items()):
            monkeypatch.setattr(code, name, plain)  # so that it is put back
        transformers._apply_liger_kernel_to_instance(model=base, **LEFT_OUT)
        return base

    monkeypatch.setattr(KernelInterface, "__getitem__", lambda kernel, grid: lambda *_, **__: None)
    monkeypatch.setattr(fused_moe, "compute_routing_metadata", route)
    monkeypatch.setattr(shape, "build_on_meta", build_with_liger)
    monkeypatch.setattr(fused_kernels, "replace_modules", lambda base, kernels: None)
    monkeypatch.setattr(fused_kernels, "replace_rope", lambda base, kernels: contextlib.nullcontext())


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed here")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_holds_what_ligers_own_functions_hold(name, method, request):
    held = trace(name, method)
    request.getfixturevalue("liger")
    own = trace(name, method)
    for ours, theirs in zip((*held.forward, *held.backward), (*own.forward, *own.backward), strict=True):
        assert ours.net == pytest.approx(theirs.net, rel=0.02)
        assert ours.peak == pytest.approx(theirs.peak, rel=0.02)


def test_a_llama_layer_holds_what_its_formulas_need():
    """With an adapter: the stream twice, two norms, q, k, v, attention, gate, values, and their product."""
    hidden, kv, inner, rank = 256, 2 * 32, 688, 16
    numbers = 6 * hidden + 2 * kv + 3 * inner + 7 * rank
    sums = 2 + 8  # float32: two norms' and each head's
    weights = rank * (4 * 2 * hidden - 2 * (hidden - kv) + 3 * (hidden + inner))  # an adapter's, in 16 bit
    expected = LENGTH * (2 * numbers + 4 * sums) + 2 * weights
    assert trace("llama", "lora").forward[1].net == pytest.approx(expected, rel=0.001)


def test_kernels_that_are_switched_off_hold_what_the_models_code_holds():
    held = {
        kernels: trace("llama", "lora", fused_kernels=frozenset(kernels)).forward[1].net
        for kernels in ((), ("rope",), ("rms_norm",), ("swiglu",), tuple(ALL))
    }
    plain, rope, norms, gates, fused = held.values()
    assert fused < min(norms, gates) < max(norms, gates) < plain
    assert rope == plain  # it saves time, and memory only for a moment
    assert plain - gates == 2 * 2 * LENGTH * 688 - 2 * LENGTH * 688  # the activated gate, of 16 bit
