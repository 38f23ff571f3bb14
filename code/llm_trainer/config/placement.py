# SPDX-License-Identifier: Apache-2.0
"""The place of this process among the machines of a job, as whatever launched it tells by environment variables.

SageMaker's resourceconfig.json wins over all of them. The others count by complete sets of variables alone, because a
shell, an image or another job may have left single ones. Sources: torch/distributed/run.py, the controllers of
Kubeflow's training-operator and trainer, srun(1), and AWS Batch's page on its environment variables.
"""

import json
import re
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace

from llm_trainer.common.errors import UserError, cut_quote

PUT_AWAY = "LLM_TRAINER_LAUNCHED_WITH"  # holds the launcher's variables, as a JSON object
WORLD_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
# What torch, torchrun and accelerate would take for their own: they stay away from our workers, and from the log.
OUTER_NAMES = (*WORLD_NAMES, "MASTER_PORT", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE")
OUTER_PREFIXES = ("PET_", "TORCHELASTIC_", "PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_")
KEPT_PREFIXES = ("SLURM_", "AWS_BATCH_JOB_")  # no library of ours reads these
JOB_NAMES = ("MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_STEP_ID")
MAIN_ADDRESS = "AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS"  # not there on the main node itself


@dataclass(frozen=True)
class Placement:
    """A process among the nodes of a job, and among the processes that its launcher started on its own node."""

    launcher: str = ""  # "" where there was none
    num_nodes: int = 1
    node_rank: int = 0
    first_address: str | None = None  # where the others reach node 0; None where the hosts have names
    local_rank: int = 0
    num_local: int = 1
    told_by: tuple[str, ...] = ()  # the variables, as NAME=value
    job: tuple[str, ...] = ()  # what tells it from other jobs of this machine
    warning: str | None = None

    @property
    def hosts(self) -> tuple[str, ...]:
        """The names of the hosts for the log and between launchers: the launchers tell only numbers."""
        return tuple(f"node-{number}" for number in range(self.num_nodes))

    def describe(self) -> str:
        """Return the line for the log: which launcher it was, and what it says of this process."""
        if not self.launcher:
            return "Launched by hand, on this machine alone."
        if not self.told_by:
            return f"Launched by {self.launcher}."
        where = f", the first at {self.first_address}" if self.num_nodes > 1 else ""
        siblings = f", with {self.num_local} processes on this node" if self.num_local > 1 else ""
        place = f"node {self.node_rank + 1} of {self.num_nodes}{where}{siblings}"
        return f"Launched by {self.launcher}: {place} ({', '.join(self.told_by)})."

    def advise(self) -> str:
        """Return the end of a sentence about hosts that never came: they may be none of this job's."""
        if not self.told_by:
            return ""
        return (
            f" It has {', '.join(self.told_by)}: give all machines of the job the same, each with a rank of its own, "
            "or unset them for a job of one machine."
        )


@dataclass(frozen=True)
class Dialect:
    """A launcher's way to tell a process its place."""

    launcher: str
    needed: tuple[str, ...]  # only with all of these is it meant
    read: Callable[[Mapping[str, str]], Placement]


def put_away(variables: MutableMapping[str, str]) -> None:
    """Move the launcher's variables into one of our own, where `read_placement` finds them and no library does.

    A stray RANK would silence the log, and have a worker wait for others for ever.
    """
    outer = {name: variables.pop(name) for name in list(variables) if is_outer(name)}
    if outer or PUT_AWAY not in variables:
        variables[PUT_AWAY] = json.dumps(outer)


def take_out(variables: MutableMapping[str, str]) -> None:
    """Undo `put_away`, for a script of the user's own."""
    variables.update(json.loads(variables.pop(PUT_AWAY, "{}")))


def is_outer(name: str) -> bool:
    """Tell whether a variable is one that a launcher sets, and that a library would take for its own."""
    return name in OUTER_NAMES or name.startswith(OUTER_PREFIXES)


def read_placement(variables: Mapping[str, str], on_sagemaker: bool) -> Placement:
    """Return where this process was placed.

    Raises UserError where a set of variables is incomplete or contradicts itself, and tells of more than one process.
    """
    outer = json.loads(variables[PUT_AWAY]) if PUT_AWAY in variables else variables
    told = {name: value for name, value in outer.items() if is_outer(name) and value.strip()}
    told |= {name: value for name, value in variables.items() if name.startswith(KEPT_PREFIXES) and value.strip()}
    if on_sagemaker:
        return place_on_sagemaker(told)
    check_range(told)
    for dialect in DIALECTS:
        if told.keys() >= {*dialect.needed}:
            placement = dialect.read(told)
            told_by = tuple(f"{name}={cut_quote(told[name])}" for name in dialect.needed)
            warning = judge_slurm(told) if dialect.read is read_slurm and placement.num_nodes == 1 else None
            return replace(placement, launcher=dialect.launcher, told_by=told_by, job=name_job(told), warning=warning)
    return Placement(warning=judge_strays(told) or judge_slurm(told))


def place_on_sagemaker(told: Mapping[str, str]) -> Placement:
    """Return the placement in a job whose hosts SageMaker names: only its siblings may come from torchrun."""
    if told.keys() >= {*TORCHRUN.needed}:
        siblings = read_torchrun(told)
        local_rank, num_local = siblings.local_rank, siblings.num_local
        return Placement("SageMaker", local_rank=local_rank, num_local=num_local, job=name_job(told))
    strays = [name for name in WORLD_NAMES if name in told]
    text = f"{list_values(told, strays)} passed over: SageMaker's resourceconfig.json names the hosts of the job."
    return Placement("SageMaker", warning=text if strays else None)


def name_job(told: Mapping[str, str]) -> tuple[str, ...]:
    """Return what tells a job from others that run on this machine, the same for all processes of a node."""
    return tuple(told.get(name, "") for name in JOB_NAMES)


def judge_strays(told: Mapping[str, str]) -> str | None:
    """Return a warning about variables of no complete set, None where there are none.

    Raises UserError where they tell of more than one process: a job of several machines must not become several jobs.
    """
    is_local = any(name in told for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    sets = ((WORLD_NAMES if is_local else PLAIN, "torchrun"), (PET, "Kubeflow"), (BATCH, "AWS Batch"), (SLURM, "srun"))
    warning = None
    for names, launcher in sets:
        found = [name for name in names if name in told]
        missing = [name for name in names if name not in told]
        counted = [name for name in found if name in COUNTS]
        if any(read_number(told, name) > COUNTS[name] for name in counted):
            raise UserError(
                f"{list_values(told, found)} in the environment without {', '.join(missing)}: set all of them, as "
                f"{launcher} does, or unset them all for a job of this machine alone."
            )
        if counted and names is not SLURM:  # every batch script has some of those
            warning = (
                warning or f"{list_values(told, found)} in the environment without {', '.join(missing)}: passed over."
            )
    return warning


def judge_slurm(told: Mapping[str, str]) -> str | None:
    """Return a warning where Slurm has given more nodes than train: in a batch script, or the shell of `salloc`."""
    num_nodes = told.get("SLURM_JOB_NUM_NODES", "1")
    if num_nodes not in ("", "1"):
        return (
            f"Slurm gives this job {num_nodes} nodes, and only this one trains: start the job by srun on all of them."
        )
    return None


def read_torchrun(told: Mapping[str, str]) -> Placement:
    """Return the placement of a process that was started once a device. Raises UserError for a contradiction."""
    rank, world_size, local_rank, num_local = (read_number(told, name) for name in WORLD_NAMES[:4])
    check_below(told, "RANK", "WORLD_SIZE")
    check_below(told, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    # GROUP_WORLD_SIZE is no help: torchrun counts nodes with it, and HyperPod's agent processes.
    if world_size % num_local or rank % num_local != local_rank:
        raise contradict(told, WORLD_NAMES[:4], "each node must have as many processes, and their ranks in order")
    return Placement("", world_size // num_local, rank // num_local, told["MASTER_ADDR"], local_rank, num_local)


def read_pet(told: Mapping[str, str]) -> Placement:
    """Return the placement of a pod of Kubeflow. Raises UserError for a contradiction."""
    check_below(told, "PET_NODE_RANK", "PET_NNODES")
    return Placement("", read_number(told, "PET_NNODES"), read_number(told, "PET_NODE_RANK"), told["PET_MASTER_ADDR"])


def check_range(told: Mapping[str, str]) -> None:
    """Raise UserError where Kubeflow gives a job a number of nodes that may change."""
    if ":" in told.get("PET_NNODES", ""):
        raise UserError(
            f"PET_NNODES={cut_quote(told['PET_NNODES'])!r} is a range: leave elasticPolicy out of the job, whose "
            "nodes stay the same."
        )


def read_plain(told: Mapping[str, str]) -> Placement:
    """Return the placement of a process that was started once a node. Raises UserError for a contradiction."""
    check_below(told, "RANK", "WORLD_SIZE")
    if "LOCAL_RANK" in told and read_number(told, "WORLD_SIZE") > 1:
        raise UserError(
            f"{list_values(told, [name for name in WORLD_NAMES if name in told])} in the environment without "
            "LOCAL_WORLD_SIZE: set it to the number of processes on each node, or unset LOCAL_RANK."
        )
    return Placement("", read_number(told, "WORLD_SIZE"), read_number(told, "RANK"), told["MASTER_ADDR"])


def read_batch(told: Mapping[str, str]) -> Placement:
    """Return the placement of a node of AWS Batch, counted from the main node. Raises UserError for a contradiction."""
    check_below(told, "AWS_BATCH_JOB_NODE_INDEX", "AWS_BATCH_JOB_NUM_NODES")
    num_nodes, main = read_number(told, "AWS_BATCH_JOB_NUM_NODES"), read_number(told, "AWS_BATCH_JOB_MAIN_NODE_INDEX")
    node_rank = (read_number(told, "AWS_BATCH_JOB_NODE_INDEX") - main) % num_nodes
    address = told.get(MAIN_ADDRESS, "localhost" if node_rank == 0 else None)
    if address is None:
        raise UserError(
            f"{list_values(told, BATCH)} in the environment without {MAIN_ADDRESS}: set it to the main node's address, "
            "as AWS Batch does."
        )
    return Placement("", num_nodes, node_rank, address)


def read_slurm(told: Mapping[str, str]) -> Placement:
    """Return the placement of a task of srun. Raises UserError for a contradiction."""
    check_below(told, "SLURM_NODEID", "SLURM_STEP_NUM_NODES")
    node_rank, num_nodes = read_number(told, "SLURM_NODEID"), read_number(told, "SLURM_STEP_NUM_NODES")
    tasks = list_tasks(told["SLURM_STEP_TASKS_PER_NODE"])
    if len(tasks) != num_nodes or read_number(told, "SLURM_LOCALID") >= tasks[node_rank]:
        raise contradict(told, SLURM)
    if len(set(tasks)) > 1:
        raise contradict(told, SLURM[2:3], "each node must have as many tasks; give srun --ntasks-per-node")
    first = name_first_host(told["SLURM_STEP_NODELIST"])
    return Placement("", num_nodes, node_rank, first, read_number(told, "SLURM_LOCALID"), tasks[node_rank])


def list_tasks(text: str) -> list[int]:
    """Return the tasks of each node that Slurm writes as `2(x3),1`; [] where it is something else."""
    counts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(",")]
    return [int(count[1]) for count in counts if count for _ in range(int(count[2] or 1))] if all(counts) else []


def name_first_host(text: str) -> str:
    """Return the first host of a list that Slurm writes as `a[03-05,9]-x,b1`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", text)
    assert first is not None  # it matches an empty text too
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


def read_number(told: Mapping[str, str], name: str) -> int:
    """Return a variable's number. Raises UserError where it is none."""
    if not re.fullmatch(r"[0-9]{1,9}", told[name].strip()):
        raise UserError(
            f"{name}={cut_quote(told[name])!r} in the environment is no number: set it as the launcher does, or unset "
            "it for a job of this machine alone."
        )
    return int(told[name])


def check_below(told: Mapping[str, str], number: str, count: str) -> None:
    """Raise UserError unless a number is below the count that belongs to it."""
    if read_number(told, number) >= read_number(told, count):
        raise contradict(told, (number, count), f"{number} counts from 0 and must be below {count}")


def contradict(told: Mapping[str, str], names: tuple[str, ...], why: str = "these contradict each other") -> UserError:
    """Return the mistake of variables that cannot all be true."""
    return UserError(
        f"{list_values(told, names)} in the environment: {why}; set them as the launcher does, or unset them for a job "
        "of this machine alone."
    )


def list_values(told: Mapping[str, str], names: Sequence[str]) -> str:
    """Return variables with their values, for a sentence."""
    return ", ".join(f"{name}={cut_quote(told[name])}" for name in names)


PLAIN = ("RANK", "WORLD_SIZE", "MASTER_ADDR")
PET = ("PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR")
BATCH = ("AWS_BATCH_JOB_NUM_NODES", "AWS_BATCH_JOB_NODE_INDEX", "AWS_BATCH_JOB_MAIN_NODE_INDEX")
SLURM = ("SLURM_STEP_NUM_NODES", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID", "SLURM_LOCALID")
TORCHRUN = Dialect("torchrun", WORLD_NAMES, read_torchrun)
# The innermost launcher first: torchrun may run in a pod of Kubeflow, and by srun.
DIALECTS = (
    TORCHRUN,
    Dialect("Kubeflow", PET, read_pet),
    Dialect("AWS Batch", BATCH, read_batch),
    Dialect("Slurm's srun", SLURM, read_slurm),
    Dialect("somebody who sets a rank for each node", PLAIN, read_plain),
)
# The greatest number that a variable has in a job of one process.
COUNTS = {
    **dict.fromkeys(
        ("RANK", "LOCAL_RANK", "PET_NODE_RANK", "AWS_BATCH_JOB_NODE_INDEX", "SLURM_NODEID", "SLURM_LOCALID"), 0
    ),
    **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "PET_NNODES", "AWS_BATCH_JOB_NUM_NODES"), 1),
    "SLURM_STEP_NUM_NODES": 1,
}
