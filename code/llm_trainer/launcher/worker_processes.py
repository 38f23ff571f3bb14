# SPDX-License-Identifier: Apache-2.0
"""The command that starts the workers, and the environment variables that they get."""

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from llm_trainer.config.checks import count_processes
from llm_trainer.config.schema import Settings
from llm_trainer.host.network import network_variables
from llm_trainer.host.nvidia_driver import driver_variables
from llm_trainer.job.inputs import Inputs
from llm_trainer.job.job import Job
from llm_trainer.readers.sources import HubSource

MASTER_PORT = 7777  # what SageMaker's own toolkit uses between hosts
# On a CPU the tensors of every step come from malloc, which by default takes large ones from the kernel, page by page
# filled with zeros, and gives them back after use: a fifth of a step's time (malloc(3), glibc's tunables).
KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}


def count_worker_processes(job: Job) -> int:
    return count_processes(job.settings, job.environment)


def build_worker_command(job: Job, arguments: Sequence[str]) -> list[str]:
    environment = job.environment
    if count_worker_processes(job) == len(environment.hosts) == 1:
        return [sys.executable, "-m", "llm_trainer.launcher.single_worker", *arguments]
    command = [sys.executable, "-m", "llm_trainer.launcher.torchrun", f"--nproc-per-node={count_worker_processes(job)}"]
    if len(environment.hosts) > 1:
        command += [
            f"--nnodes={len(environment.hosts)}",
            f"--node-rank={environment.node_rank}",
            f"--master-addr={environment.hosts[0]}",
            f"--master-port={MASTER_PORT}",
        ]
    # Told its own name, torchrun does not look it up, which takes minutes where nobody answers.
    command += [f"--local-addr={environment.current_host if len(environment.hosts) > 1 else '127.0.0.1'}"]
    return [*command, "--module", "llm_trainer.worker", *arguments]


def build_worker_variables(job: Job, scratch_dir: Path, started: float) -> dict[str, str]:
    """The workers' environment variables: threads that share the cores, the network, and the libraries' own."""
    variables = {
        "PYTHONUNBUFFERED": "1",
        "LLM_TRAINER_SCRATCH": str(scratch_dir),
        "LLM_TRAINER_STARTED": str(started),
        # torchrun would set 1, which halves the speed of a single CPU rank
        "OMP_NUM_THREADS": str(max(1, job.environment.num_cpus // count_worker_processes(job))),
        **network_variables(job.environment),
    }
    if job.settings.parallelism.use_cpu or not job.environment.num_gpus:
        variables |= KEPT_MEMORY
    if len(job.environment.hosts) > 1:
        variables["LLM_TRAINER_HOST"] = job.environment.current_host
    variables |= build_library_variables(job.settings, job.inputs)
    return variables | driver_variables(variables)


def build_library_variables(settings: Settings, inputs: Inputs) -> dict[str, str]:
    """This process's variables, and what libraries of models and data are told: caches off the small root disk, no
    needless talk."""
    variables = {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # carriage returns spoil CloudWatch's lines
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        **build_cache_variables(os.environ),
        **os.environ,  # what the user sets in the job's Environment wins
    }
    if not needs_hub(settings, inputs):
        variables["HF_HUB_OFFLINE"] = "1"  # nothing to fetch: look-ups would only wait for a network
    return variables


def needs_hub(settings: Settings, inputs: Inputs) -> bool:
    """Whether the model, its chat template or data come from the Hugging Face Hub, or the result goes there."""
    places = (inputs.model, settings.model.chat_template_path)
    has_hub_data = any(isinstance(source, HubSource) for source in (*inputs.train, *inputs.validation))
    return settings.output.push_to_hub or has_hub_data or any(place and not Path(place).exists() for place in places)


def build_cache_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Where libraries keep what they download and compile: the warm pool's folder if there is one, else /tmp."""
    root = Path(variables.get("SAGEMAKER_MANAGED_WARMPOOL_CACHE_DIRECTORY", tempfile.gettempdir()))
    return {
        "HF_HOME": str(root / "huggingface"),
        "LLM_TRAINER_CACHE": str(root / f"llm-trainer-{os.getuid()}"),  # of one user: another may not write there
        "TRITON_CACHE_DIR": str(root / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(root / "inductor"),
    }
