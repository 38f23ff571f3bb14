# SPDX-License-Identifier: Apache-2.0
"""The way that a job is made to fit its GPUs, and what a job that cannot is told."""

import re
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, Qwen3MoeConfig

from llm_trainer.common.errors import UserError
from llm_trainer.common.units import GIB
from llm_trainer.config.schema import Settings
from llm_trainer.config.sections import ALIASES
from llm_trainer.model.device import Device
from llm_trainer.model.memory.fit import (
    ELSEWHERE,
    KEPT_SHARE,
    choose_kernels,
    choose_memory_plan,
    estimate_ways,
    find_target,
    move_elsewhere,
)
from llm_trainer.model.memory.remedies import enlarge_devices, fits_at_best
from llm_trainer.model.memory.scenario import MemoryScenario, MemorySettings, Target

LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
MEDIUM = LlamaConfig(
    vocab_size=4000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16
)
SMALL = LlamaConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=3, intermediate_size=64, num_attention_heads=4)
MIXTURE = Qwen3MoeConfig(
    vocab_size=1000,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=4,
    moe_intermediate_size=32,
)
CPU = Device(torch.device("cpu"))


def gpus(number: int, gib: float) -> Target:
    return Target(ELSEWHERE, world_size=number, free_bytes=int(gib * GIB))


def sections(**options):
    given = Settings(**options)
    return MemorySettings(given.model, given.adapter, given.data, given.training, given.parallelism)


def choose(target, config=LLAMA_8B, row=2048, attention="flash_attention_2", earlier=None, **options):
    return choose_memory_plan(MemoryScenario(config, sections(**options), row, target, attention), earlier)


@pytest.mark.parametrize(
    ("number", "gib", "options", "chosen"),
    [
        (1, 79, {"per_device_train_batch_size": 1}, ("ddp", False, False)),
        (1, 79, {}, ("ddp", True, False)),
        (8, 79, {}, ("ddp", True, False)),
        (1, 23, {"load_in_4bit": True}, ("ddp", True, False)),
        (8, 23, {}, ("fsdp", True, False)),
        (8, 79, {"use_peft": False}, ("fsdp", True, False)),
        (16, 23, {"use_peft": False, "per_device_train_batch_size": 1}, ("fsdp", True, False)),
        (8, 79, {"distribution": "fsdp", "per_device_train_batch_size": 1}, ("fsdp", False, False)),
        (1, 79, {"activation_offloading": True, "gradient_checkpointing": True}, ("ddp", True, True)),
    ],
)
def test_the_cheapest_way_that_fits(number, gib, options, chosen):
    fit = choose(gpus(number, gib), **options)
    assert (fit.distribution, fit.gradient_checkpointing, fit.activation_offloading) == chosen
    assert fit.estimate.total_bytes <= gib * GIB
    assert not fit.warning


def test_only_as_many_layers_are_recomputed_as_must_be():
    target = gpus(1, 79)
    fit = choose(target, per_device_train_batch_size=8)
    number = 32 - fit.kept_layers
    assert 0 < number < 32
    assert f": training with gradient checkpointing of {number} of 32 layers, " in fit.reason
    assert fit.describe()["kept_layers"] == fit.kept_layers
    scenario = MemoryScenario(LLAMA_8B, sections(per_device_train_batch_size=8), 2048, target, "flash_attention_2")
    more = replace(fit.parallelism, kept_layers=fit.kept_layers + 1)
    assert fit.estimate.total_bytes <= KEPT_SHARE * target.free_bytes < scenario.estimate(more).total_bytes


@pytest.mark.parametrize("recomputes", [True, False])
def test_a_user_who_says_so_recomputes_all_layers_or_none(recomputes):
    fit = choose(gpus(1, 100), SMALL, gradient_checkpointing=recomputes)
    assert (fit.gradient_checkpointing, fit.kept_layers) == (recomputes, 0)


def test_layers_keep_nothing_where_activations_go_to_the_host():
    fit = choose(gpus(1, 79), per_device_train_batch_size=8, activation_offloading=True, gradient_checkpointing=None)
    assert fit.kept_layers == 0


def test_what_a_gpu_elsewhere_needs_counts_ligers_kernels():
    fused, plain = (
        estimate_ways(move_elsewhere(SMALL, sections(use_liger_kernel=uses), 2048))["training"]
        for uses in (None, False)
    )
    assert fused.parts["activations"] < 0.9 * plain.parts["activations"]


def test_the_reason_has_the_numbers():
    fit = choose(gpus(8, 23))
    assert re.fullmatch(
        r"DDP needs [\d.]+ GiB a GPU, .* and 23 GiB are free: FSDP with .*, [\d.]+ GiB a GPU", fit.reason
    )


@pytest.mark.parametrize(
    ("number", "gib", "options"),
    [(1, 7, {"use_peft": False}), pytest.param(2, 2.1, {"distribution": "ddp"}, marks=pytest.mark.long)],
)
def test_what_a_job_that_cannot_fit_is_told_makes_it_fit(number, gib, options):
    target = gpus(number, gib)
    with pytest.raises(UserError) as refusal:
        choose(target, MEDIUM, 512, **options)
    changes = str(refusal.value).partition("what makes it fit: ")[2].rstrip(".").split("; or ")
    assert len(changes) == 3
    for change in changes:
        given = dict(options)
        changed = target
        for words in re.split(r" and | with ", change):
            if found := re.fullmatch(r"(\d+) such GPUs", words):
                changed = gpus(int(found[1]), gib)
            elif found := re.fullmatch(r"GPUs of (\d+) GiB", words):
                changed = gpus(changed.world_size, 0.97 * int(found[1]))
            else:
                name, _, value = words.partition("=")
                given[ALIASES.get(name, name)] = {"true": True, "false": False}.get(value, value)
        fit = choose(changed, MEDIUM, 512, **given)
        assert fit.estimate.total_bytes <= changed.free_bytes, change


def test_a_run_that_goes_on_stays_distributed_as_it_was():
    target = gpus(2, 20)
    fits = [choose(target, SMALL, 16, earlier=earlier) for earlier in (None, "ddp", "fsdp")]
    assert [fit.distribution for fit in fits] == ["ddp", "ddp", "fsdp"]
    assert choose(gpus(1, 20), SMALL, 16, earlier="fsdp").distribution == "ddp"


def test_a_run_that_was_not_sharded_is_where_it_would_not_fit():
    assert choose(gpus(8, 23), earlier="ddp").distribution == "fsdp"


def test_what_cannot_be_sharded_is_not():
    with pytest.raises(UserError) as refusal:
        choose(gpus(8, 1), MEDIUM, 512, load_in_8bit=True, gradient_checkpointing=True, activation_offloading=False)
    assert "fsdp" not in str(refusal.value).lower()


def test_check_memory_false_tries_it():
    fit = choose(gpus(1, 1), MEDIUM, 512, check_memory=False)
    assert "it may run out of memory" in fit.warning
    assert fit.gradient_checkpointing


def test_a_model_whose_code_wants_numbers_is_not_refused(monkeypatch):
    from transformers.models.llama import modeling_llama

    def ask(self, x, *args, **kwargs):
        return x if x.sum() > 0 else -x

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", ask)
    fit = choose(gpus(1, 79), SMALL)
    assert fit.estimate is None
    assert fit.gradient_checkpointing
    assert "does not run without numbers" in fit.warning


def test_a_cpu_is_asked_for_its_memory():
    target = find_target(CPU, None)
    assert (target.on_gpu, target.world_size) == (False, 1)
    assert GIB / 8 < target.free_bytes < 2**50
    fit = choose(target, SMALL, row=16, attention="sdpa")
    assert (fit.distribution, fit.gradient_checkpointing) == ("ddp", False)
    case = MemoryScenario(SMALL, sections(), 16, replace(target, free_bytes=2**20), "sdpa")
    ((change, larger),) = enlarge_devices(case)
    assert re.fullmatch(r"a machine with [\d.]+ MiB free for each process", change)
    assert fits_at_best(larger) and not fits_at_best(case)


@pytest.mark.parametrize(
    ("config", "options", "kernels"),
    [
        (SMALL, {}, {"rope", "rms_norm", "swiglu", "geglu"}),
        (MIXTURE, {}, {"rope", "rms_norm", "geglu"}),
        (MIXTURE, {"use_peft": False}, {"rope", "rms_norm", "geglu"}),
        (MIXTURE, {"liger_kernel_config": {"swiglu": True}}, {"rope", "rms_norm", "swiglu", "geglu"}),
        (MIXTURE, {"use_liger_kernel": False}, set()),
    ],
)
def test_an_estimate_counts_the_liger_kernels_that_a_job_gets(config, options, kernels):
    scenario = MemoryScenario(config, sections(**options), 64, gpus(1, 79), "sdpa")
    assert choose_kernels(scenario).fused_kernels == kernels


def test_needs_of_one_gpu_anywhere():
    needs = estimate_ways(move_elsewhere(LLAMA_8B, sections(), 2048))
    assert list(needs) == ["training", "training with gradient checkpointing"]
    plain, checkpointed = (need.total_bytes for need in needs.values())
    assert checkpointed < plain / 3
