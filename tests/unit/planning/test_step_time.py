# SPDX-License-Identifier: Apache-2.0
"""The seconds of a step beside those that one H200 took, and what must hold for any model."""

import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from llm_trainer.config.schema import Settings
from llm_trainer.data.images.row_images import RowImages
from llm_trainer.model.device import Device
from llm_trainer.model.liger import KERNELS
from llm_trainer.model.memory.batch import Batch
from llm_trainer.model.memory.scenario import MemoryScenario, MemorySettings, ParallelismPlan, Target
from llm_trainer.model.memory.shape import UnknownShapeError
from llm_trainer.planning import step_time
from llm_trainer.planning.efficiency import read_host
from llm_trainer.planning.instances import read_instances
from llm_trainer.planning.step_time import (
    ROW_START,
    SHORTEST_SHARE,
    Pass,
    Rates,
    computes_logits_again,
    count_causal_attention,
    count_read_bytes,
    list_writing,
    time_step,
)

BENCH = Path(__file__).parents[3] / "bench"
sys.path.append(str(BENCH))
from scaling import LLAMA_8B  # noqa: E402
from step_times import JOBS, list_published, plan_step  # noqa: E402

from support.teachers import describe_teacher  # noqa: E402

FIGURES = json.loads((BENCH / "gpu-h200.json").read_text())
PUBLISHED = {f"{name} on {case.host}": (case, seconds) for name, case, seconds in list_published()}
H200 = read_instances().types["ml.p5en.48xlarge"]
TINY = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
CONFIGS = {"8B": LLAMA_8B, "tiny": TINY}
NO_SAVINGS = ParallelismPlan(sharded=False, recompute_activations=False, offload_activations=False)
RECOMPUTES = replace(NO_SAVINGS, recompute_activations=True)


@cache
def build_scenario(config="8B", gpus=1, **settings):
    """Eight rows of 1,024 tokens a GPU, as bench/gpu.py takes them."""
    given = {"max_length": 1024, "per_device_train_batch_size": 8, "lora_r": 16, "lora_dropout": 0.0, **settings}
    every = Settings(**given)
    work = every.data, every.training, every.parallelism, every.methods
    sections = MemorySettings(every.model, every.adapter, *work)
    target = Target(Device(torch.device("cuda"), "H200", (9, 0)), gpus, 140 * 2**30)
    return MemoryScenario(CONFIGS[config], sections, 1024, target, "flash_attention_2", frozenset(KERNELS))


@pytest.mark.parametrize("name", JOBS)
def test_a_jobs_step_takes_what_it_took_alone_on_one_h200(name):
    step, measured = plan_step(JOBS[name]), FIGURES["steps"][name]["step_ms"] / 1000
    assert step.seconds == pytest.approx(measured, rel=0.08)
    assert round(1000 * step.seconds) == FIGURES["steps"][name]["planned_ms"]  # else run bench/step_times.py
    low, high = step.range_seconds
    assert low < measured < high


@pytest.mark.parametrize(
    ("variant", "settings", "plan", "attention"),
    [
        ("first release", {"lora_dropout": 0.1}, RECOMPUTES, "flash_attention_2"),
        ("sdpa", {"packing": True, "max_length": 4096, "per_device_train_batch_size": 2}, NO_SAVINGS, "sdpa"),
        ("fp8, fused", {"base_compute": "fp8"}, NO_SAVINGS, "flash_attention_2"),
    ],
)
def test_a_variant_of_the_step_takes_what_one_h200_took(variant, settings, plan, attention):
    step = time_step(H200, replace(build_scenario(**settings), attention=attention), plan, 1, 1024)
    assert step.seconds == pytest.approx(FIGURES["variants"][variant]["step_ms"] / 1000, rel=0.08)


@pytest.mark.long
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_job_lies_within_the_range_of_its_plan(name):
    case, seconds = PUBLISHED[name]
    low, high = plan_step(case).range_seconds
    assert low < seconds < high


def test_a_step_of_few_tokens_takes_what_its_host_takes():
    few, more = (
        time_step(H200, build_scenario("tiny", max_length=length), NO_SAVINGS, 1, length) for length in (8, 64)
    )
    assert few.seconds == more.seconds
    host = read_host(of_gpus=True)
    assert few.range_seconds == pytest.approx((host.low * few.seconds, host.high * few.seconds), rel=1e-4)
    assert few.seconds > host.between_seconds


@pytest.mark.parametrize(("is_own_host", "seconds"), [(False, 2.0), (True, 3.0)])
def test_a_cpu_starts_its_operations_itself(is_own_host, seconds):
    rates = Rates(1e9, 1e9, 1e9, 1e9, 0.1, 0.0, 0.0, is_own_host)
    work = Pass(products=2e9, float8_products=0, attention=0, moved=0, offloaded=0, launches=10, functions=0)
    assert work.time(rates) == pytest.approx(seconds)


def test_many_logits_are_computed_again_on_a_cpu_alone():
    on_gpu = build_scenario()
    on_cpu = on_gpu.replace_target(device=Device(torch.device("cpu")))
    few = replace(on_cpu, known_batch=Batch(1, 1024, num_scored=10))
    assert [computes_logits_again(each) for each in (on_gpu, on_cpu, few)] == [False, True, False]


def test_short_rows_take_longer_in_attention_than_their_operations_do():
    short, long = (count_causal_attention(build_scenario(), tokens) for tokens in (128, 4096))
    assert long / short == pytest.approx((4096 + ROW_START) / (128 + ROW_START))


@pytest.mark.parametrize("kept_layers", [0, 1, 2])
def test_layers_that_keep_their_activations_are_not_computed_again(kept_layers):
    scenario = build_scenario("tiny")
    plans = [NO_SAVINGS, replace(RECOMPUTES, kept_layers=kept_layers, num_layers=3), RECOMPUTES]
    times = [time_step(H200, scenario, plan, 1, 1024).compute_seconds for plan in plans]
    assert times[0] < times[1] <= times[2]
    assert times[2] - times[1] == pytest.approx(kept_layers / 3 * (times[2] - times[0]), rel=0.1)


def test_accumulated_batches_take_their_time_and_gpus_wait_for_each_other():
    one, two = (
        time_step(H200, build_scenario("tiny", gradient_accumulation_steps=pieces), NO_SAVINGS, 1, 1024)
        for pieces in (1, 2)
    )
    assert one.waiting_seconds == 0
    between = read_host(of_gpus=True).between_seconds
    assert 1.9 < (two.compute_seconds - between) / (one.compute_seconds - between) <= 2
    sharded = replace(NO_SAVINGS, sharded=True)
    within = time_step(H200, build_scenario("tiny", gpus=8), sharded, 8, 1024)
    between = time_step(H200, build_scenario("tiny", gpus=16), sharded, 16, 1024)
    assert 0 < within.waiting_seconds <= within.traffic_seconds < between.traffic_seconds


def test_a_model_that_cannot_be_traced_is_timed_by_formula(monkeypatch):
    def refuse(shape, step):
        raise UnknownShapeError("its code asks for numbers")

    scenario = build_scenario("8B")
    traced = time_step(H200, scenario, NO_SAVINGS, 1, 1024)
    monkeypatch.setattr(step_time, "trace_step", refuse)
    step = time_step(H200, scenario, NO_SAVINGS, 1, 1024)
    assert traced.is_traced
    assert not step.is_traced
    assert step.seconds == pytest.approx(traced.seconds, rel=0.05)


def test_a_t4_computes_float32_without_tensor_cores():
    t4 = read_instances().types["ml.g4dn.xlarge"]
    half, whole = (
        time_step(t4, build_scenario(torch_dtype=dtype), NO_SAVINGS, 1, 1024) for dtype in ("float16", "float32")
    )
    assert whole.compute_seconds > 1.5 * half.compute_seconds


def test_a_step_of_pairs_has_twice_the_rows_and_a_forward_pass_of_the_reference():
    sft = time_step(H200, build_scenario(per_device_train_batch_size=16), NO_SAVINGS, 1, 1024)
    first = time_step(H200, build_scenario(method="dpo", precompute_ref_log_probs=True), NO_SAVINGS, 1, 1024)
    each = time_step(H200, build_scenario(method="dpo"), NO_SAVINGS, 1, 1024)
    assert first.seconds == pytest.approx(sft.seconds)
    assert 1.3 < each.seconds / first.seconds < 1.6  # an adapter's backward pass takes as much as its forward pass
    assert each.range_seconds[0] < each.seconds < each.range_seconds[1]


def test_a_step_of_kto_has_three_passes_more_where_its_loss_estimates_a_divergence():
    losses = ("apo_zero_unpaired", "kto")
    plain, estimating = (
        time_step(H200, build_scenario(method="kto", loss_type=loss), NO_SAVINGS, 1, 1024) for loss in losses
    )
    sft = time_step(H200, build_scenario(), NO_SAVINGS, 1, 1024)
    forward = plain.compute_seconds - sft.compute_seconds
    assert estimating.compute_seconds - sft.compute_seconds == pytest.approx(3 * forward)


WRITING = {"method": "grpo", "max_length": 64, "num_generations": 8, "max_completion_length": 128}


def time_writing(config="tiny", **settings):
    """The seconds of a step in which completions are written."""
    return time_step(H200, build_scenario(config, **{**WRITING, **settings}), NO_SAVINGS, 1, 1024)


def test_each_token_that_is_written_takes_a_pass_over_the_model():
    sft = time_step(H200, build_scenario("tiny", max_length=192), NO_SAVINGS, 1, 1024)
    short, long = time_writing(), time_writing(max_length=192, max_completion_length=256)
    passes = list_writing(build_scenario("tiny", **WRITING), Pass(1, 0, 1, 1, 0, 100, 10), evaluates=False)
    assert [times for times, _ in passes] == [1, 127]  # the pass over the prompts gives the first token
    assert short.seconds > 20 * sft.seconds
    assert (long.seconds - sft.seconds) / (short.seconds - sft.seconds) == pytest.approx(255 / 127, rel=0.1)
    low, high = short.range_seconds
    host = read_host(of_gpus=True)
    assert (low, high) == pytest.approx(
        (SHORTEST_SHARE * host.low * short.seconds, host.high * short.seconds), rel=0.01
    )


def test_steps_that_share_a_generation_share_its_time():
    one, two, four = (
        time_writing(**settings).seconds - time_writing(max_completion_length=1).seconds
        for settings in ({}, {"num_iterations": 2}, {"gradient_accumulation_steps": 4})
    )
    assert two == pytest.approx(one / 2, rel=0.1)
    assert four == pytest.approx(one, rel=0.2)  # written at once, and the host is what a token waits for


def test_a_large_model_reads_its_weights_for_each_token():
    written = time_writing("8B", max_completion_length=65).seconds - time_writing("8B", max_completion_length=1).seconds
    weights = count_read_bytes(build_scenario("8B", **WRITING).shape, torch.bfloat16)
    assert 15e9 < weights < 16.1e9  # all but the embeddings, of which few are looked up
    assert written / 64 > weights / 4.8e12


def test_evaluations_write_too_in_batches_of_their_own():
    scenario = build_scenario("tiny", **WRITING, per_device_eval_batch_size=2)
    writes = [list_writing(scenario, Pass(1, 0, 1, 1, 0, 100, 10), evaluates) for evaluates in (False, True)]
    assert [times for times, _ in writes[1]] == [4 * times for times, _ in writes[0]]
    step = time_step(H200, scenario, NO_SAVINGS, 1, 1024)
    assert step.evaluation_passes == pytest.approx(4 * step.untrained_passes, rel=0.01)


def test_a_teacher_adds_a_forward_pass_of_its_own_shape():
    plain = build_scenario("8B", method="distill")
    times = [
        time_step(H200, scenario, NO_SAVINGS, 1, 1024)
        for scenario in (
            replace(plain, known_shape=plain.shape),
            *(replace(plain, teacher=describe_teacher(CONFIGS[name]), known_shape=plain.shape) for name in CONFIGS),
        )
    ]
    without, large, small = (each.compute_seconds for each in times)
    assert 0.25 < (large - without) / without < 0.5  # a third of four passes, where a frozen base takes two others
    assert 0 < small - without < 0.1 * (large - without)
    assert times[0].untrained_passes == 0
    assert times[1].untrained_passes == times[1].evaluation_passes == pytest.approx(1, rel=0.2)


def test_a_tower_that_is_not_followed_leaves_the_time_unknown():
    images = RowImages({"pixel_values": torch.empty(1, 3, 8, 8, device="meta")})
    assert time_step(H200, replace(build_scenario("tiny"), images=images), NO_SAVINGS, 1, 1024) is None


def test_a_teacher_of_unknown_shape_leaves_the_time_unknown(monkeypatch):
    def refuse(teacher, dtype):
        raise UnknownShapeError("its code asks for numbers")

    scenario = replace(build_scenario("tiny", method="distill"), teacher=describe_teacher(TINY))
    assert time_step(H200, scenario, NO_SAVINGS, 1, 1024)
    monkeypatch.setattr(step_time.MemoryScenario, "teacher_shape", property(lambda own: refuse(own, None)))
    assert time_step(H200, scenario, NO_SAVINGS, 1, 1024) is None
