# SPDX-License-Identifier: Apache-2.0
"""The stand-in for TRL's activation offloading moves and keeps what TRL's own class does."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, LlamaConfig
from trl.models.activation_offloading import OffloadActivations

from llm_trainer.config.schema import Settings
from llm_trainer.model.memory.offloading import MIN_BYTES, WINDOW, Moved, Offload
from llm_trainer.model.memory.shape import read_shape
from llm_trainer.model.memory.step_trace import Step, trace_step

HIDDEN, LENGTH = 256, 128
CONFIG = LlamaConfig(
    vocab_size=500,
    hidden_size=HIDDEN,
    intermediate_size=688,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
STREAM = SimpleNamespace(**dict.fromkeys(("wait_event", "wait_stream", "synchronize"), lambda *_: None))
STREAM.record_event = lambda: None


@pytest.fixture
def trls(monkeypatch):
    """TRL's own class on a CPU, whose streams are nothing."""
    device = SimpleNamespace(
        empty_cache=lambda: None,
        Stream=lambda: STREAM,
        current_stream=lambda: STREAM,
        stream=lambda _: contextlib.nullcontext(),
    )
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    return OffloadActivations(use_pin_memory=False)


def save_tensors(build_hooks):
    """Return what hooks for a model's parameters keep of each tensor that a forward pass saves, and the loss."""
    packed, alive = [], []  # TRL knows a storage by its address: none may be used again

    def pack(tensor):
        alive.append(tensor)
        packed.append(hooks.pack_hook(tensor))
        return packed[-1]

    torch.manual_seed(0)
    tokens = torch.arange(LENGTH)[None]
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIG), attn_implementation="sdpa")
    hooks = build_hooks(model)
    with saved_tensors_hooks(pack, hooks.unpack_hook):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    return packed, loss


def count_bytes(tensors):
    """Of storages, each counted once."""
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def test_what_is_moved_and_what_stays_is_as_in_trls_code(trls):
    """After a forward pass. A storage that is saved twice in a row stays, though it was copied."""
    assert (trls.min_tensor_size_bytes, trls.max_fwd_stash_size) == (MIN_BYTES, WINDOW)
    numbers, loss = save_tensors(lambda model: trls.update_model_params(model) or trls)
    theirs = [trls.tracker[number][:2] for number in numbers]
    ours = []
    packed, again = save_tensors(lambda model: ours.append(Offload(list(model.parameters()))) or ours[0])
    assert again == loss
    assert [isinstance(each, Moved) for each in packed] == [moved for _, moved in theirs]
    assert ours[0].moved_bytes == count_bytes(tensor for tensor, moved in theirs if moved)
    kept = [each for each in packed if not isinstance(each, Moved)]
    assert count_bytes(kept) == count_bytes(tensor for tensor, moved in theirs if not moved)
    assert ours[0].count_leaving() == count_bytes(tensor for tensor, _ in trls.fwd_stash.values())


def trace(recomputes, offloads):
    settings = Settings(lora_r=16, lora_dropout=0.0)
    shape = read_shape(copy.deepcopy(CONFIG), settings.model, settings.adapter, torch.bfloat16)
    kernels = frozenset({"rope", "rms_norm", "swiglu"})
    return trace_step(shape, Step(1, LENGTH, False, False, torch.bfloat16, recomputes, offloads, False, True, kernels))


def test_a_layer_keeps_three_tensors_that_were_saved_twice():
    """The input of q, k and v; attention's result, which o_proj saves too; the input of gate and up."""
    hidden_bytes = 2 * LENGTH * HIDDEN
    layer = trace(recomputes=False, offloads=True).forward[1]
    assert layer.net == pytest.approx(3 * hidden_bytes, rel=0.02)


def test_inputs_of_recomputed_layers_do_not_add_up():
    """What is on its way to the host counts in the peak alone."""
    hidden_bytes = 2 * LENGTH * HIDDEN
    moved, kept = (trace(recomputes=True, offloads=offloads).forward[1] for offloads in (True, False))
    assert (moved.net, kept.net) == (0, hidden_bytes)
    assert moved.peak == kept.peak + hidden_bytes


def test_what_comes_back_is_released_after_the_next_operation():
    held, seen = Offload([]), []
    x = torch.ones(4, MIN_BYTES, requires_grad=True)
    with held:
        y = x
        for _ in range(WINDOW + 4):
            y = y.exp()  # which saves its result
    y.register_hook(lambda _: seen.append(len(held.returned)))
    y.sum().backward()
    assert held.num_saved == WINDOW + 4
    assert (held.leaving, held.returned, seen) == ({}, [], [0])
