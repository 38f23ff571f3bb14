# SPDX-License-Identifier: Apache-2.0
"""The model behind bench/scaling.md: beside what real ranks sent, and what must hold at every size."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[3] / "bench"
sys.path.append(str(BENCH))
from ranks import RANDOM_MODEL, Job, compute_bytes  # noqa: E402
from scaling import G5, P4D, P5, SCENARIOS, Scenario, list_rows, render  # noqa: E402

from llm_trainer.planning.traffic import BULK, time_ring  # noqa: E402

EMBEDDINGS = 16_384 * 512
LAYER = 512 * (512 + 256 + 256 + 512) + 3 * 512 * 1408 + 2 * 512
ALL = 2 * EMBEDDINGS + 8 * LAYER + 512  # with the output layer and the last norm
ADAPTER = 8 * 8 * (2 * (512 + 512) + 2 * (512 + 256) + 3 * (512 + 1408))  # 8 layers, rank 8, seven matrices


@pytest.mark.parametrize(
    ("job", "numbers", "measured"),
    [
        (Job(2, "ddp"), 2 * ADAPTER, 4_806_460),
        (Job(4, "ddp", use_peft=False), 3 * 2 * ALL, 970_508_321),
        # Gathered forward, again but for the output layer and the norm, and reduced by gloo's all-reduce.
        (Job(2, "fsdp", use_peft=False), ALL + (ALL - EMBEDDINGS - 512) + 2 * ALL, 613_348_262),
        (Job(4, "fsdp"), 3 * ((ALL + ADAPTER) + (ALL + ADAPTER - EMBEDDINGS - 512) + 2 * ADAPTER), 898_522_766),
        (Job(2, "fsdp", use_peft=False, pieces=2), 2 * (4 * ALL - EMBEDDINGS - 512), 1_226_880_759),
    ],
    ids=lambda value: value.name if isinstance(value, Job) else "",
)
def test_the_bytes_of_a_step_are_those_that_crossed_the_loopback(job, numbers, measured):
    computed = compute_bytes(job, RANDOM_MODEL)
    assert computed == 4 * numbers
    assert computed <= measured < 1.003 * computed + 40_000  # headers, and a few numbers of metrics


def rows_of(*words, **options):
    (scenario,) = [each for each in SCENARIOS if each == Scenario(*words, **options)]
    return list(list_rows(scenario))


@pytest.mark.long
def test_the_tables_of_the_document_are_what_the_program_prints():
    document = (BENCH / "scaling.md").read_text(encoding="utf-8")
    tables = document.partition("<!-- tables -->\n")[2].partition("<!-- end of tables -->")[0]
    assert tables == render()


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.title)
def test_more_gpus_train_faster_and_each_at_most_as_well(scenario):
    rows = [row for row in list_rows(scenario) if row.fits]
    for fewer, more in pairwise(rows):
        assert more.tokens_per_second > fewer.tokens_per_second
        assert more.efficiencies <= fewer.efficiencies
        assert more.checkpoint_bytes == fewer.checkpoint_bytes
    assert all(0 < serial <= overlapped <= 1 for overlapped, serial in (row.efficiencies for row in rows))


def measure_need(row):
    """What a job takes of a GPU: first the layers that it cannot keep, then the memory."""
    return row.recomputed_layers, row.memory_bytes


def test_memory_falls_with_shards_and_not_with_copies():
    sharded = rows_of("70B", "all weights", "fsdp", P5)
    assert [row.fits for row in sharded] == [False, False, True, True, True, True, True]
    assert all(measure_need(more) < measure_need(fewer) for fewer, more in pairwise(sharded))
    copied = [row for row in rows_of("70B", "QLoRA", "ddp", P5) if row.pieces == 1]
    assert len({row.memory_bytes for row in copied}) == 1


def test_shards_within_a_host_leave_the_network_to_the_gradients():
    everywhere, within = (rows_of("70B", "LoRA", "fsdp", P5, **options) for options in ({}, {"within_host": True}))
    assert everywhere[0].network_bytes == within[0].network_bytes == 0
    for over_all, own in zip(everywhere[1:], within[1:], strict=True):
        assert own.network_bytes < over_all.network_bytes / 100
        assert measure_need(own) > measure_need(over_all)


def test_a_ring_crosses_the_slowest_link_once_and_hops_from_gpu_to_gpu():
    size, share = 10**9, 0.8
    assert time_ring(P5, 1, size, 1) == 0
    within = BULK["start"] + 7 * BULK["nvlink"] + 7 / 8 * size / (share * 450e9)
    assert time_ring(P5, 8, size, 1) == pytest.approx(within)
    between = BULK["start"] + 14 * BULK["nvlink"] + BULK["network"] + 15 / 16 * size / (share * 50e9)
    assert time_ring(P4D, 16, size, 1) == pytest.approx(between)
    assert time_ring(G5, 16, 0, 3) == pytest.approx(3 * (BULK["start"] + 14 * BULK["pcie"] + BULK["network"]))
