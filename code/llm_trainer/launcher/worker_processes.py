# SPDX-License-Identifier: Apache-2.0
"""The command that starts a host's workers, and the environment variables that they get."""

import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from llm_trainer.common.processes import PYTHON, SAFE_PATH
from llm_trainer.config.environment import Environment
from llm_trainer.host.network import build_network_variables
from llm_trainer.host.nvidia_driver import build_driver_variables
from llm_trainer.host.sealed_folders import make_private_folder
from llm_trainer.job.inputs import Inputs
from llm_trainer.job.rank_traces import build_trace_variables
from llm_trainer.readers.sources import HubSource

MASTER_PORT = 7777  # what SageMaker's own toolkit uses between hosts
IMPORT_SECONDS = 60  # beside the time for hosts to meet: torchrun imports torch first
# On a CPU the tensors of every step come from malloc. By default it takes large ones from the kernel, page by page
# filled with zeros, and gives them back after use: a fifth of a step's time (malloc(3), glibc's tunables).
KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
# On a GPU, rows of different lengths would leave the memory in pieces that are too small. Torch 2.11 to 2.13 read
# both names, and mix what they say (c10/cuda/CUDAAllocatorConfig.h, c10/core/AllocatorConfig.h).
ALLOCATOR, OLDER_ALLOCATOR = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
GROWING_SEGMENTS = "expandable_segments:True"


@dataclass(frozen=True)
class WorkerProcesses:
    """The workers of this host: how many there are, and whether they compute on GPUs."""

    environment: Environment
    num_processes: int
    on_gpu: bool
    host_timeout_seconds: float

    def build_command(self) -> list[str]:
        """Return the command that starts the workers.

        One process on one host needs no torchrun, whose import of torch takes seconds.
        """
        environment = self.environment
        if self.num_processes == len(environment.hosts) == 1:
            return [*PYTHON, "-m", "llm_trainer.launcher.single_worker"]
        command = [*PYTHON, "-m", "llm_trainer.launcher.torchrun", f"--nproc-per-node={self.num_processes}"]
        if len(environment.hosts) > 1:
            command += [
                f"--nnodes={len(environment.hosts)}",
                f"--node-rank={environment.node_rank}",
                f"--master-addr={environment.first_address}",
                f"--master-port={MASTER_PORT}",
                f"--rdzv-conf=timeout={math.ceil(self.host_timeout_seconds) + IMPORT_SECONDS}",
            ]
        # Told its own name, torchrun does not look it up, which takes minutes where nobody answers.
        command += [f"--local-addr={environment.current_host if len(environment.hosts) > 1 else '127.0.0.1'}"]
        return [*command, "--", *PYTHON, "-m", "llm_trainer.worker"]

    def build_variables(self, scratch_dir: Path, started: float, libraries: Mapping[str, str]) -> dict[str, str]:
        """Return the workers' environment: threads that share the cores, the network, and the libraries' variables.

        `started` is the job's start in seconds since the epoch, `libraries` what `build_library_variables` returns.
        """
        environment = self.environment
        variables = {
            "PYTHONUNBUFFERED": "1",
            "LLM_TRAINER_SCRATCH": str(scratch_dir),
            "LLM_TRAINER_STARTED": str(started),
            # torchrun would set 1, which halves the speed of a single CPU rank.
            "OMP_NUM_THREADS": str(max(1, environment.num_cpus // self.num_processes)),
            **build_network_variables(environment),
            **build_trace_variables(environment.output_dir, libraries),
        }
        if not self.on_gpu:
            variables |= KEPT_MEMORY
        elif OLDER_ALLOCATOR not in libraries:  # the user's own, which ours would add to
            variables[ALLOCATOR] = GROWING_SEGMENTS
        if len(environment.hosts) > 1:
            variables["LLM_TRAINER_HOST"] = environment.current_host
        variables |= {**libraries, **SAFE_PATH}
        if "PYTHONPATH" in variables:  # an empty part of it is the working folder
            places = variables["PYTHONPATH"].split(os.pathsep)
            variables["PYTHONPATH"] = os.pathsep.join(place for place in places if os.path.isabs(place))
        return variables | build_driver_variables(variables)


def build_library_variables(inputs: Inputs, chat_template_path: str | None, pushes_to_hub: bool) -> dict[str, str]:
    """Return this process's variables and those that libraries of models and data read.

    Caches stay off the small root disk, and libraries keep quiet. What the user sets in the job's Environment wins.
    """
    variables = {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # carriage returns spoil CloudWatch's lines
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        # Transformers would fetch code for kernels from the Hub, and weights that a bot has converted.
        "USE_HUB_KERNELS": "NO",
        "DISABLE_SAFETENSORS_CONVERSION": "1",
        **build_cache_variables(os.environ),
        **os.environ,
    }
    if not (pushes_to_hub or reads_from_hub(inputs, chat_template_path)):
        variables["HF_HUB_OFFLINE"] = "1"  # nothing to fetch: look-ups would only wait for a network
    return variables


def reads_from_hub(inputs: Inputs, chat_template_path: str | None) -> bool:
    """Tell whether a model, its chat template, an earlier adapter or data come from the Hugging Face Hub."""
    has_hub_data = any(isinstance(source, HubSource) for source in (*inputs.train, *inputs.validation))
    places = (inputs.model, inputs.adapter, inputs.teacher, chat_template_path)
    return has_hub_data or any(place and not os.path.exists(place) for place in places)


def build_cache_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Return where libraries keep what they download and compile: in the warm pool's folder if there is one, else /tmp.

    All lies in one folder of this user that nobody else may write to: what is compiled there is run as this job.
    """
    shared = variables.get("SAGEMAKER_MANAGED_WARMPOOL_CACHE_DIRECTORY", tempfile.gettempdir())
    root = find_cache_root(Path(shared))
    return {
        "HF_HOME": str(root / "huggingface"),
        "LLM_TRAINER_CACHE": str(root / "tokens"),
        "TRITON_CACHE_DIR": str(root / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(root / "inductor"),
    }


@cache
def find_cache_root(shared: Path) -> Path:
    """Return this user's folder for all caches, made if it is missing; the same one for the whole job."""
    return make_private_folder(shared / f"llm-trainer-{os.getuid()}")
