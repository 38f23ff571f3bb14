# SPDX-License-Identifier: Apache-2.0
"""A traced step counts each storage once, and knows what recomputation, offloading and a mask change.

That its sum is that of a real step is tested in test_estimate.py.
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch.autograd import Function
from transformers import LlamaConfig

from llm_trainer.config.schema import Settings
from llm_trainer.model.layers.reward_head import describe_rewards
from llm_trainer.model.memory import step_trace
from llm_trainer.model.memory.shape import UnknownShapeError, read_shape
from llm_trainer.model.memory.step_trace import (
    HeldBytes,
    Span,
    Step,
    count_functions,
    make_flash_buffers,
    trace_step,
)
from support.packed_models import KEEP_APART, LEAK

WIDTH, LENGTH = 128, 256
CONFIG = LlamaConfig(
    vocab_size=500, hidden_size=WIDTH, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4
)
STEP = Step(
    num_sequences=2,
    length=LENGTH,
    has_mask=False,
    stores_scores=False,
    compute_dtype=torch.float32,
    recompute_activations=False,
    offload_activations=False,
    sharded=False,
    on_gpu=False,
)
HIDDEN_BYTES = 2 * LENGTH * WIDTH * 4  # what goes from layer to layer, in float32


@pytest.fixture(scope="module")
def shape():
    settings = Settings(use_peft=False)
    return read_shape(CONFIG, settings.model, settings.adapter, torch.float32)


def test_storages_are_counted_once_and_while_they_live():
    known = torch.ones(1000)
    with HeldBytes([known], "first") as held:
        view = known[:10]
        made = known + 1
        again = made.view(10, 100)
        assert held.held == 4000
        held.begin("second")
        more = made * 2
        del more
        del made, again
        assert held.held == 0
        held.begin("over")
    assert view.numel() == 10
    # A sum and a product each read a tensor and write one, and views neither move nor start anything.
    assert held.spans == {"first": Span(4000, 4000, 8000, launches=1), "second": Span(4000, -4000, 8000, launches=1)}


class Doubled(Function):
    """A function in Python, which fills a place that it made."""

    @staticmethod
    def forward(ctx, x):
        return x.new_empty(x.shape).copy_(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def test_functions_in_python_are_counted_in_both_passes_and_places_do_not_move():
    given = torch.ones(1000, requires_grad=True)
    with HeldBytes([given], "forward") as held, count_functions(held):
        made = Doubled.apply(given)
        held.begin("backward")
        made.backward(torch.ones(1000))
        held.begin("over")
    assert held.spans["forward"].functions == held.spans["backward"].functions == 1
    assert held.spans["forward"].moved == 8000  # what is copied is read, and its place is written
    Doubled.apply(given)
    assert held.functions == 0


def test_a_layer_leaves_activations_and_its_backward_pass_takes_them_away(shape):
    trace = trace_step(shape, STEP)
    assert trace.embedding.net >= HIDDEN_BYTES
    assert all(span.net >= HIDDEN_BYTES for span in trace.forward)
    assert all(span.peak >= span.net for span in (*trace.forward, *trace.backward))
    assert len({*trace.forward[1:]}) == 1
    assert len(trace.forward) == len(trace.backward) == len(trace.offloaded)
    assert not any(trace.offloaded)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_recomputed_layers_leave_nothing_but_what_they_begin_with(shape, on_gpu):
    kept, recomputed = (
        trace_step(shape, replace(STEP, recompute_activations=recomputes, on_gpu=on_gpu))
        for recomputes in (False, True)
    )
    assert recomputed.forward[1].net == HIDDEN_BYTES < kept.forward[1].net
    assert recomputed.backward[1].peak > kept.backward[1].peak


def test_a_base_in_float8_leaves_what_it_leaves_in_bfloat16():
    step = replace(STEP, compute_dtype=torch.bfloat16, on_gpu=True)
    plain, in_float8 = (
        trace_step(read_shape(CONFIG, settings.model, settings.adapter, torch.bfloat16), step)
        for settings in (Settings(), Settings(base_compute="fp8"))
    )
    assert [span.net for span in in_float8.forward] == [span.net for span in plain.forward]
    rounded = 2 * LENGTH * CONFIG.intermediate_size  # a byte for each number that goes into a product
    for span, other in zip(in_float8.forward + in_float8.backward, plain.forward + plain.backward, strict=True):
        assert 0 <= span.peak - other.peak <= rounded


def test_offloaded_activations_are_not_held(shape):
    kept, moved = (trace_step(shape, replace(STEP, offload_activations=offloads)) for offloads in (False, True))
    assert moved.offloaded[1] > 0
    assert moved.forward[1].net < kept.forward[1].net


def test_scores_of_attention_are_four_heads_of_length_by_length(shape):
    fused, eager = (trace_step(shape, replace(STEP, stores_scores=stores)) for stores in (False, True))
    scores_bytes, sums_bytes = 2 * 4 * LENGTH * LENGTH * 4, 2 * 4 * LENGTH * 4  # a fused kernel keeps a sum a row
    assert eager.forward[1].net - fused.forward[1].net == scores_bytes - sums_bytes


def test_flash_attentions_backward_pass_has_buffers_on_a_gpu():
    """Queries' gradient in float32, a number for each row of scores, and each head's share of keys' and values'."""
    q, shared = torch.empty(2, 8, LENGTH, 80), torch.empty(2, 2, LENGTH, 80, dtype=torch.bfloat16)
    made = make_flash_buffers(q.bfloat16(), shared, shared)
    rows = 2 * 8 * LENGTH
    assert [buffer.nbytes for buffer in made] == [4 * rows * 96, 4 * rows, 2 * rows * 80, 2 * rows * 80]
    assert len(make_flash_buffers(q, q, q)) == 2


def test_a_model_whose_code_asks_for_numbers_is_unknown(shape, monkeypatch):
    def ask(shape, step):
        raise RuntimeError("Cannot call .item() on a fake tensor")

    monkeypatch.setattr(step_trace, "run_fake_step", ask)
    with pytest.raises(UnknownShapeError, match="item"):
        trace_step(shape, replace(STEP, length=LENGTH + 8))


@pytest.mark.parametrize("name", ["gemma3", "qwen3-moe", "mamba", "jamba"])
def test_models_of_other_kinds_are_traced_too(name):
    """Frequencies for each kind of layer, experts in float32, and masks of two dimensions."""
    settings = Settings()
    config = copy.deepcopy({**KEEP_APART, **LEAK}[name])
    shape = read_shape(config, settings.model, settings.adapter, torch.float32)
    masked = replace(STEP, length=16, has_mask=True)
    assert all(span.peak > 0 for span in trace_step(shape, masked).forward)


@pytest.mark.parametrize("limit", [500, 501])  # one of them is reached where torch's C++ asks, which no error may end
def test_following_a_model_ends_at_any_operation(limit, shape, monkeypatch):
    monkeypatch.setattr(step_trace, "MAX_OPERATIONS", limit // 10)
    with pytest.raises(UnknownShapeError, match="token by token"):
        trace_step(shape, replace(STEP, length=40 + limit))


def test_a_model_that_goes_through_a_row_token_by_token_is_not_followed_for_minutes():
    settings = Settings()
    shape = read_shape(copy.deepcopy(LEAK["mamba"]), settings.model, settings.adapter, torch.float32)
    with pytest.raises(UnknownShapeError, match="token by token"):
        trace_step(shape, replace(STEP, length=4096))


def test_pieces_of_the_loss_that_are_alike_are_counted_and_not_traced(shape, monkeypatch):
    def trace_counting(rows, skips):
        operations = []
        count = HeldBytes.__torch_dispatch__
        with monkeypatch.context() as patches:
            patches.setattr(HeldBytes, "__torch_dispatch__", lambda *each: operations.append(1) or count(*each))
            if not skips:
                patches.setattr(HeldBytes, "skip_alike", lambda held, *bounds: range(*bounds))
            step = replace(STEP, num_sequences=rows, length=4 * LENGTH, on_gpu=True)
            return step_trace.run_fake_step(shape, step), len(operations)

    few, whole = trace_counting(13, skips=True), trace_counting(13, skips=False)  # the last of four pieces is smaller
    assert few[0] == whole[0]
    assert few[1] == trace_counting(40, skips=True)[1] < whole[1]


def test_a_reward_model_computes_no_logits(shape):
    """Its head is a row of weights, and reads one token of a sequence."""
    config = copy.deepcopy(CONFIG)
    describe_rewards(config)
    settings = Settings(use_peft=False)
    rewarding = read_shape(config, settings.model, settings.adapter, torch.float32)
    plain, found = trace_step(shape, STEP), trace_step(rewarding, STEP)
    assert found.forward == plain.forward
    assert found.head.peak < plain.head.peak
    assert found.head.peak < 6 * HIDDEN_BYTES
    assert rewarding.count_weights("output") == WIDTH
    assert rewarding.num_trained == shape.num_trained - CONFIG.vocab_size * WIDTH + WIDTH
