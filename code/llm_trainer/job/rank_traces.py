# SPDX-License-Identifier: Apache-2.0
"""The rank that did not come to a collective that others waited for, by the traces of PyTorch's flight recorder.

It keeps the newest collectives of a process (torch/csrc/distributed/c10d/FlightRecorder.hpp, version 2). Where one
times out, NCCL's watchdogs write a pickle for each rank that still lives. Gloo has no watchdog: a worker writes the
same as JSON when it fails. A rank that hangs leaves no file then, which tells as much.
"""

import io
import json
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from llm_trainer.common import log
from llm_trainer.common.errors import Failure, Wait
from llm_trainer.common.files import write_text

# What torch puts before a rank's number, and the same by its older name, which a user may have set.
TRACE_VARIABLE, OLDER_TRACE_VARIABLE = "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"
FILE_PREFIX = "collectives-rank-"  # in output/data
MAX_TRACE_BYTES = 64 << 20  # 2,000 collectives with their stacks take a few
MAX_NAMED_RANKS = 8
REPORT_SECONDS = 10.0  # ranks that wait for one and the same time out within this of each other
STOP_GROUP = "stop consensus"  # the description of our group of all ranks (training/stopping.py)
TRACE_PLACE = f"The collectives of the ranks that waited are in output/data ({FILE_PREFIX}*)."
GROUPS_OF_ALL = ("default_pg", STOP_GROUP)  # the first one is torch's


def build_trace_variables(output_dir: Path, given: Mapping[str, str]) -> dict[str, str]:
    """Return the variables by which torch leaves its traces in the output; {} where the user has chosen a place."""
    if TRACE_VARIABLE in given or OLDER_TRACE_VARIABLE in given:
        return {}
    return {TRACE_VARIABLE: str(output_dir / "data" / FILE_PREFIX), "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}


def find_trace_prefix(variables: Mapping[str, str]) -> str:
    """Return what stands before a rank's number in the paths of traces; an empty text where none are left."""
    return variables.get(TRACE_VARIABLE) or variables.get(OLDER_TRACE_VARIABLE, "")


def write_trace(prefix: str, rank: int, content: bytes) -> None:
    """Write the JSON of a rank's trace. Raises OSError."""
    write_text(Path(f"{prefix}{rank}.json"), content.decode(), errors="replace")


class PlainUnpickler(pickle.Unpickler):
    """Reads pickles of plain values alone: whatever a file may hold, nothing of it is run."""

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        """Refuse every class and function."""
        raise pickle.UnpicklingError(f"a trace has no {module_name}.{global_name}")


@dataclass(frozen=True)
class RankTraces:
    """The traces of the ranks of this host, in a job of several ranks."""

    prefix: str
    hosts: Sequence[str]
    num_ranks: int

    def make_folder(self) -> None:
        """Make the folder of the traces, which torch does not. Where it cannot be made, there will be none."""
        try:
            Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            log.warning(f"{Path(self.prefix).parent} cannot be made ({error}): a hang will leave no trace.")

    def read_waits(self, since: float) -> list[Wait]:
        """Return what the ranks that left a trace after `since`, in seconds since the epoch, were waiting for."""
        folder, name = Path(self.prefix).parent, Path(self.prefix).name
        waits = []
        for file in sorted(folder.glob(f"{name}*")) if name and folder.is_dir() else ():
            found = re.fullmatch(rf"{re.escape(name)}(\d+)(\.json)?", file.name)
            if found and (written := file.stat().st_mtime) >= since:
                waits.append(find_wait(int(found[1]), read_trace(file), written, self.num_ranks))
        return [wait for wait in waits if wait]

    def blame_missing_ranks(self, cause: Failure, waits: Sequence[Wait]) -> Failure:
        """Return the failure of the ranks that did not come; the cause itself where it says more or none is missing."""
        found = find_missing_ranks(waits) if cause.kind == "peer" and any(wait.timed_out for wait in waits) else None
        if found is None:
            return cause
        wait, missing = found
        names = [self.name_rank(rank) for rank in missing[:MAX_NAMED_RANKS]]
        more = f" and {len(missing) - MAX_NAMED_RANKS} more" if len(missing) > MAX_NAMED_RANKS else ""
        reason = (
            f"Rank {', '.join(names)}{more} did not come to {wait.what}, for which rank {wait.rank} waited longer than "
            f"ddp_timeout (now {wait.limit_seconds:.0f} s): the log holds what it said last; if it is only slow, raise "
            f"ddp_timeout.{f' {TRACE_PLACE}' if wait.number else ''}"
        )
        return replace(cause, reason=reason, kind="fault", waits=())

    def name_rank(self, rank: int) -> str:
        """Return a rank's number, with its host where there are several."""
        if len(self.hosts) == 1:
            return str(rank)
        return f"{rank} on host {self.hosts[rank * len(self.hosts) // self.num_ranks]}"


def read_trace(file: Path) -> Any:
    """Return what a trace holds; None for a file that is none, such as one that was cut off."""
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_TRACE_BYTES)
        return json.loads(content) if file.suffix == ".json" else PlainUnpickler(io.BytesIO(content)).load()
    # What Python's pickle raises for bytes that are none, by its documentation.
    except (
        OSError,
        ValueError,
        RecursionError,
        pickle.UnpicklingError,
        EOFError,
        LookupError,
        AttributeError,
        TypeError,
    ):
        return None


def find_wait(rank: int, trace: Any, written: float, num_ranks: int) -> Wait | None:
    """Return what a rank waited for by its trace, which was `written` then, in seconds since the epoch.

    None where it waited for nothing, or where the trace is none. The job has `num_ranks`.
    """
    try:
        entry = find_pending_entry([entry for entry in trace["entries"] if not entry["is_p2p"]])
        if entry is None:
            return None
        name, description = entry["process_group"]
        listed = json.loads(trace["pg_config"].get(name, {}).get("ranks", "[]"))
        limit_seconds, number = entry["timeout_ms"] / 1000, int(entry["collective_seq_id"])
        return Wait(
            rank=rank,
            ranks=[int(member) for member in listed] or list(range(num_ranks if description in GROUPS_OF_ALL else 0)),
            what=f"{entry['profiling_name'].partition(':')[2]}, collective {number} of its group",
            number=number,
            limit_seconds=limit_seconds,
            timed_out=written - entry["time_created_ns"] / 1e9 >= limit_seconds,
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def describe_meeting(rank: int, num_ranks: int, limit_seconds: float) -> Wait:
    """Return the wait of a rank for all others at the start, when a group of ranks is made. No trace has it."""
    what = "the meeting of all ranks at the start"
    return Wait(rank, list(range(num_ranks)), what, number=0, limit_seconds=limit_seconds, timed_out=True)


def find_pending_entry(entries: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the oldest collective that is not over.

    Gloo's entries never change. A worker writes them when its newest collective has failed.
    """
    if entries and entries[-1]["profiling_name"].startswith("gloo:"):
        return entries[-1]
    return next((entry for entry in entries if entry["state"] != "completed"), None)


def find_missing_ranks(waits: Sequence[Wait]) -> tuple[Wait, list[int]] | None:
    """Return the earliest collective that ranks of its group did not come to, and those ranks; None where all came.

    A rank that waits in another group, perhaps for the same one, is not missing.
    """
    waiting = {wait.rank for wait in waits}
    for wait in sorted(waits, key=lambda wait: (wait.number, wait.rank)):
        missing = [rank for rank in wait.ranks if rank not in waiting]
        if missing:
            return wait, missing
    return None
