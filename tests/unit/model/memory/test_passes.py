# SPDX-License-Identifier: Apache-2.0
"""Gathered weights and reduced gradients are counted where FSDP2 holds them, and at no other moment of a step."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from llm_trainer.model.memory.passes import Pass, Peak, Unit, find_peak, list_passes
from llm_trainer.model.memory.shape import Part
from llm_trainer.model.memory.step_trace import Span, Step, StepTrace

STEP = Step(1, 8, False, False, torch.bfloat16, False, False, sharded=True, on_gpu=True)
EMBEDDINGS, LAYER, NORM, OUTPUT = 1000, 200, 12, 1000  # numbers of weights
TRACE = StepTrace(
    Span(1, 1), (Span(11, 10), Span(12, 10)), Span(500, 3), (Span(30, -10), Span(40, -10)), Span(2, -1), (0, 0)
)


def build_shape(tied=False, trained=True):
    numbers = [("embeddings", None, EMBEDDINGS), ("linear", 0, LAYER), ("linear", 1, LAYER), ("other", None, NORM)]
    numbers += [] if tied else [("output", None, OUTPUT)]
    parts = [Part(role, layer, n, n, 4 * n, 0, 4 * n * trained, 0) for role, layer, n in numbers]
    layers = [[part for part in parts if part.layer == index] for index in (0, 1)]
    return SimpleNamespace(parts=parts, num_layers=2, kinds=(0, 1), list_layers=lambda: layers)


def list_all(shape, world_size, **step):
    passes = list_passes(shape, replace(STEP, **step), world_size, (TRACE, TRACE), 0)
    assert [each.span for each in passes] == [
        TRACE.embedding,
        *TRACE.forward,
        TRACE.head,
        *TRACE.backward[::-1],
        TRACE.end,
    ]
    return passes


@pytest.mark.parametrize(
    ("tied", "world_size", "gathered"),
    [
        (False, 1, [2000, 400, 400, 2024, 400, 400, 2000]),
        (False, 4, [2000, 800, 800, 2424, 800, 800, 2000]),
        (True, 1, [2024, 2424, 2424, 2024, 2424, 2424, 2024]),  # they stay from the first to the last moment
        (True, 4, [2024, 2824, 2824, 2424, 2824, 2824, 2024]),
    ],
)
def test_a_unit_is_gathered_while_it_computes(tied, world_size, gathered):
    """In bfloat16. On several ranks a layer's copy is on its way, or the next layer."""
    assert [each.gathered for each in list_all(build_shape(tied), world_size)] == gathered


def test_gradients_are_made_in_16_bit_and_reduced_in_float32_unit_by_unit():
    passes = list_all(build_shape(), world_size=4)
    layer = Unit(2 * LAYER, 2 * LAYER, LAYER, 4 * LAYER)
    tail, embeddings = Unit(2024, 2024, 1012, 4048), Unit(2000, 2000, 1000, 4000)
    assert [each.unit for each in passes] == [Unit(), Unit(), Unit(), tail, layer, layer, embeddings]
    assert [each.still_gathered for each in passes[3:]] == [400, 400, 400, 0]


def test_tied_embeddings_are_reduced_at_the_end():
    passes = list_all(build_shape(tied=True), world_size=1)
    assert (passes[3].unit, passes[-1].unit) == (Unit(), Unit(2024, 2024, 4048, 4048))


@pytest.mark.parametrize("tied", [True, False])
def test_without_fsdp_nothing_is_gathered(tied):
    passes = list_all(build_shape(tied), world_size=4, sharded=False)
    assert not any(each.gathered or each.unit.reduced for each in passes)
    gradients = [each.unit.made for each in passes[3:]]
    assert gradients == ([4048, 800, 800, 0] if tied else [4048, 800, 800, 4000])
    assert [each.unit.kept for each in passes[3:]] == gradients


def test_frozen_weights_are_gathered_and_not_reduced():
    passes = list_all(build_shape(trained=False), world_size=4)
    assert passes[1].gathered == 800
    assert not any(each.unit.reduced or each.unit.kept for each in passes)


def test_the_peak_is_the_moment_of_the_largest_sum():
    """The float32 copy of the tail's gradients is no part of the loss's own moment."""
    unit = Unit(gathered=50, made=20, kept=40, reduced=40)
    passes = [Pass(Span(100, 100), gathered=10), Pass(Span(80, 20), unit, 50), Pass(Span(0, -110), Unit(), 5)]
    assert find_peak(passes, accumulated=0) == Peak(0, 100, 80, 50, 0)
    later = [passes[0], replace(passes[1], span=Span(20, 20), still_gathered=7), passes[2]]
    assert find_peak(later, accumulated=0) == Peak(40, 100, 0, 7, 40)
    last = [*later[:2], replace(passes[2], span=Span(90, -110))]
    assert find_peak(last, accumulated=0) == Peak(40, 100, 90, 5, 40)
    assert find_peak(last, accumulated=60) == Peak(60, 100, 90, 5, 40)
