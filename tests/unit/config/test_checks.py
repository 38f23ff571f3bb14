# SPDX-License-Identifier: Apache-2.0
"""What the settings ask for is compared with the machines of the job."""

from dataclasses import replace
from typing import Any

import pytest

from llm_trainer.config.checks import (
    HARDWARE_RULES,
    count_processes,
    count_usable_hosts,
    find_contradictions,
    find_missing_hardware,
    keep_valid,
)
from llm_trainer.config.schema import FIELDS, Settings
from support.environments import build_environment


def find_missing(num_gpus: int = 0, hosts: tuple[str, ...] = ("algo-1",), **values: Any) -> list[str]:
    environment = build_environment(num_gpus=num_gpus, hosts=hosts)
    return list(find_missing_hardware(Settings(**values), environment))


def test_rules_name_settings_that_exist():
    assert all(set(rule.settings) <= set(FIELDS) for rule in HARDWARE_RULES)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"attn_implementation": "flex_attention"}, "attn_implementation=flex_attention runs only on an NVIDIA GPU"),
        ({"activation_offloading": True}, "activation_offloading=true without a GPU"),
        ({"activation_offloading": True, "use_cpu": True, "num_gpus": 1}, "activation_offloading=true without a GPU"),
        ({"torch_dtype": "float16"}, "torch_dtype=float16 needs an NVIDIA GPU"),
        ({"tf32": True, "use_cpu": True, "num_gpus": 1}, "tf32=true needs an NVIDIA GPU"),
        ({"base_compute": "fp8"}, "base_compute=fp8 needs an NVIDIA GPU of compute capability 8.9 or later"),
        ({"use_liger_kernel": True}, "use_liger_kernel=true needs an NVIDIA GPU"),
        ({"ddp_backend": "nccl"}, "ddp_backend=nccl needs an NVIDIA GPU"),
        ({"distribution": "fsdp"}, "distribution=fsdp with one process: there is nobody to share the model with"),
        ({"nproc_per_node": 4, "num_gpus": 2}, "nproc_per_node=4 is more than this host's 2 GPUs: leave it out"),
    ],
)
def test_what_the_machines_lack_is_told(values, sentence):
    (problem,) = find_missing(**values)
    assert problem.startswith(sentence)


@pytest.mark.parametrize(
    "values",
    [
        {"attn_implementation": "sdpa"},
        {"attn_implementation": "flash_attention_2", "num_gpus": 1},
        {"distribution": "fsdp", "num_gpus": 2},
        {"distribution": "fsdp", "hosts": ("algo-1", "algo-2")},
        {"nproc_per_node": 4},
        {"tf32": False, "use_liger_kernel": False, "ddp_backend": "gloo"},
        {"tf32": True, "num_gpus": 1},
        {"base_compute": "fp8", "num_gpus": 1},
        {"nproc_per_node": 4, "num_gpus": 2, "use_cpu": True},
    ],
)
def test_what_the_machines_have_is_fine(values):
    assert find_missing(**values) == []


@pytest.mark.parametrize(
    ("values", "num_gpus", "num_processes"),
    [
        ({}, 0, 1),
        ({}, 4, 4),
        ({"use_cpu": True}, 4, 1),
        ({"nproc_per_node": 2}, 4, 2),
        ({"nproc_per_node": 2}, 0, 2),
    ],
)
def test_one_process_a_gpu_unless_the_user_says_otherwise(values, num_gpus, num_processes):
    environment = build_environment(num_gpus=num_gpus)
    assert count_processes(Settings(**values).parallelism, environment) == num_processes


def test_contradictions_are_told_in_the_order_of_the_table():
    problems = list(find_contradictions(Settings(bf16=True, fp16=True, load_in_4bit=True, use_peft=False)))
    assert [problem.split("=")[0] for problem in problems] == ["load_in_4bit", "bf16"]


def test_what_breaks_a_rule_alone_is_left_out_of_what_is_examined_next():
    settings = Settings(optim="lomo", model_init_kwargs="dtype", target_modules="(q", bf16=True, fp16=True, seed=7)
    assert keep_valid(settings).given == {"bf16": True, "fp16": True, "seed": 7}


@pytest.fixture
def four_hosts():
    return replace(build_environment(), hosts=("algo-1", "algo-2", "algo-3", "algo-4"))


def settings(**values):
    return Settings(model_id="org/model", max_restarts=3, **values)


@pytest.mark.parametrize(
    ("values", "counts"),
    [
        ({}, [4]),
        ({"global_batch_size": 48, "min_hosts": 4}, [4]),
        ({"global_batch_size": 48, "min_hosts": 2}, [4, 3, 2]),
        ({"global_batch_size": 48, "min_hosts": 1}, [4, 3, 2, 1]),
        ({"global_batch_size": 64, "min_hosts": 2}, [4, 2]),  # three hosts cannot share it
        ({"global_batch_size": 64, "min_hosts": 2, "per_device_train_batch_size": 16}, [4, 2]),
    ],
)
def test_a_job_goes_on_with_as_many_hosts_as_can_share_its_batch(four_hosts, values, counts):
    assert count_usable_hosts(settings(**values), four_hosts) == counts
    assert list(find_missing_hardware(settings(**values), four_hosts)) == []


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"global_batch_size": 40, "min_hosts": 5}, "min_hosts=5 is more than the hosts of the job, which are 4: "),
        ({"min_hosts": 3}, "min_hosts=3 without global_batch_size: "),
        ({"global_batch_size": 40, "min_hosts": 3}, "min_hosts=3: no smaller number of hosts than 4 can share "),
        (
            {"global_batch_size": 48, "min_hosts": 3, "streaming": True, "max_steps": 5},
            "min_hosts=3 with streaming=true: ",
        ),
    ],
)
def test_what_fewer_hosts_cannot_go_on_with_is_refused(four_hosts, values, sentence):
    (problem,) = find_missing_hardware(settings(**values), four_hosts)
    assert problem.startswith(sentence)


def test_shards_of_a_lost_host_would_be_missing(four_hosts):
    environment = replace(four_hosts, sharded_channels=frozenset({"train"}))
    (problem,) = find_missing_hardware(settings(global_batch_size=48, min_hosts=3), environment)
    assert problem.startswith("min_hosts=3 with data that are ShardedByS3Key: the rows of a lost host")
