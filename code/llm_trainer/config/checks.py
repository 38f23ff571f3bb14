# SPDX-License-Identifier: Apache-2.0
"""Checks of settings that are each valid: against each other, and against the machines of the job."""

from collections.abc import Iterator

from llm_trainer.config.environment import Environment
from llm_trainer.config.global_batch import find_global_batch, list_host_counts
from llm_trainer.config.rules.rule import HardwareRule
from llm_trainer.config.rules.table import RULES, uses_fsdp
from llm_trainer.config.schema import Settings, show_value
from llm_trainer.config.sections import ParallelismSettings


def find_contradictions(settings: Settings) -> Iterator[str]:
    """Yield a sentence for each rule between settings that these break."""
    for rule in RULES:
        yield from rule.find_problems(settings)


def keep_valid(settings: Settings) -> Settings:
    """Return the settings without those that break a rule alone: what reads them would only tell the same once more."""
    mistaken = {name for rule in RULES if len(rule.settings) == 1 and rule.when(settings) for name in rule.settings}
    return Settings(**{name: value for name, value in settings.given.items() if name not in mistaken})


def find_missing_hardware(settings: Settings, environment: Environment) -> Iterator[str]:
    """Yield a sentence for each setting that asks for what the machines, as seen from this host, do not have."""
    for rule in HARDWARE_RULES:
        yield from rule.find_problems(settings, environment)


def count_processes(settings: ParallelismSettings, environment: Environment) -> int:
    """Return the number of worker processes on this host.

    As many as a launcher started here where it started several; else by default one a GPU, or one on a CPU.
    """
    if environment.placement.num_local > 1:
        return environment.placement.num_local
    num_gpus = 0 if settings.use_cpu else environment.num_gpus
    return settings.nproc_per_node or num_gpus or 1


def count_devices(settings: ParallelismSettings, environment: Environment) -> int:
    """Return the number of devices of the job: all hosts have as many as this one."""
    return count_processes(settings, environment) * len(environment.hosts)


def count_usable_hosts(settings: Settings, environment: Environment) -> list[int]:
    """List with how many hosts the job may train, the most first."""
    parallelism, num_processes = settings.parallelism, count_processes(settings.parallelism, environment)
    return list_host_counts(settings.training, settings.data, environment.hosts, parallelism.min_hosts, num_processes)


def may_lose_hosts(settings: Settings, environment: Environment) -> bool:
    """Tell whether the job may train with fewer hosts than it has."""
    return (settings.parallelism.min_hosts or len(environment.hosts)) < len(environment.hosts)


def runs_on_cpu(settings: ParallelismSettings, environment: Environment) -> bool:
    """Tell whether the workers compute on the CPU."""
    return settings.use_cpu or not environment.num_gpus


def refuse_on_cpu(name: str, value: str) -> HardwareRule:
    """Return the rule that this value of a setting needs a GPU."""
    return HardwareRule(
        (name, "use_cpu"),
        lambda s, e: show_value(s.value(name)).strip("'") == value and runs_on_cpu(s.parallelism, e),
        f"{name}={value} needs an NVIDIA GPU and there is none to use: leave it out.",
    )


# In the conditions, `s` stands for the settings of the job and `e` for its environment.
HARDWARE_RULES = (
    HardwareRule(
        ("attn_implementation",),
        lambda s, e: s.model.attn_implementation not in ("auto", "sdpa", "eager") and not e.num_gpus,
        "attn_implementation={attn_implementation} runs only on an NVIDIA GPU and there is none here: leave it out.",
    ),
    *(
        refuse_on_cpu(name, value)
        for name, value in (
            ("torch_dtype", "float16"),
            ("fp16", "true"),
            ("fp16_full_eval", "true"),
            ("tf32", "true"),
            ("use_liger_kernel", "true"),
            ("ddp_backend", "nccl"),
        )
    ),
    HardwareRule(
        ("base_compute", "use_cpu"),
        lambda s, e: s.model.base_compute == "fp8" and runs_on_cpu(s.parallelism, e),
        "base_compute=fp8 needs an NVIDIA GPU of compute capability 8.9 or later and there is none to use: leave it "
        "out.",
    ),
    HardwareRule(
        ("activation_offloading", "use_cpu"),
        lambda s, e: bool(s.parallelism.activation_offloading) and (s.parallelism.use_cpu or not e.num_gpus),
        "activation_offloading=true without a GPU: activations are in the host's memory anyway; remove it.",
    ),
    HardwareRule(
        ("distribution", "nproc_per_node"),
        lambda s, e: uses_fsdp(s) and count_devices(s.parallelism, e) == 1,
        "distribution=fsdp with one process: there is nobody to share the model with; remove it, or use more GPUs or "
        "hosts.",
    ),
    HardwareRule(
        ("nproc_per_node",),
        lambda s, e: 0 < e.num_gpus < (s.parallelism.nproc_per_node or 0) and not s.parallelism.use_cpu,
        "nproc_per_node={nproc_per_node} is more than this host's {num_gpus} GPUs: leave it out to use them all.",
    ),
    HardwareRule(
        ("nproc_per_node",),
        lambda s, e: 1 < e.placement.num_local != (s.parallelism.nproc_per_node or e.placement.num_local),
        "nproc_per_node={nproc_per_node} is not the number of processes that the launcher started on this host: leave "
        "it out.",
    ),
    HardwareRule(
        ("use_cpu",),
        lambda s, e: 1 < e.placement.num_local > e.num_gpus > 0 and not s.parallelism.use_cpu,
        "The launcher started more processes on this host than it gives this one GPUs, which are {num_gpus}: let it "
        "start one process a host with all GPUs of it, such as by --ntasks-per-node=1 --gpus-per-node=8 of srun.",
    ),
    HardwareRule(
        ("min_hosts",),
        lambda s, e: (s.parallelism.min_hosts or 0) > len(e.hosts),
        "min_hosts={min_hosts} is more than the hosts of the job, which are {num_hosts}: lower it, or start the job on "
        "more.",
    ),
    HardwareRule(
        ("min_hosts",),
        lambda s, e: may_lose_hosts(s, e) and bool(e.sharded_channels),
        "min_hosts={min_hosts} with data that are ShardedByS3Key: the rows of a lost host would be missing; use "
        "FullyReplicated.",
    ),
    HardwareRule(
        ("min_hosts", "streaming"),
        lambda s, e: may_lose_hosts(s, e) and s.data.streaming,
        "min_hosts={min_hosts} with streaming=true: fewer hosts cannot go on in the streams of {num_hosts}; remove one "
        "of them.",
    ),
    HardwareRule(
        ("min_hosts", "global_batch_size", "global_batch_tokens"),
        lambda s, e: may_lose_hosts(s, e) and find_global_batch(s.training, s.data) is None,
        "min_hosts={min_hosts} without global_batch_size: fewer hosts would train on smaller steps; say how many rows "
        "a step has on all hosts together.",
    ),
    HardwareRule(
        ("min_hosts", "global_batch_size", "global_batch_tokens"),
        lambda s, e: may_lose_hosts(s, e) and len(count_usable_hosts(s, e)) == 1,
        "min_hosts={min_hosts}: no smaller number of hosts than {num_hosts} can share the global batch; make it a "
        "multiple of their devices, or lower min_hosts.",
    ),
)
