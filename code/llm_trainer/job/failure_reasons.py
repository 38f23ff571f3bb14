# SPDX-License-Identifier: Apache-2.0
"""The sentence for an exception, or a signal that killed a worker: what happened, and what to change.

Libraries tell the same thing in many ways. An exception's class decides where it says enough, its text elsewhere. Notes
on the exception tell what the program was doing (common/activity_notes.py).
"""

import errno
import os
import re
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_trainer.common.activity_notes import EVALUATION, read_notes
from llm_trainer.common.errors import Failure, Kind, UserError, quote_error, report_failure, walk_causes
from llm_trainer.common.files import write_text
from llm_trainer.common.hub import find_refusal
from llm_trainer.common.ranks import describe_rank
from llm_trainer.config.global_batch import describe_smaller_pieces
from llm_trainer.config.sections import (
    AdapterSettings,
    DataSettings,
    ModelSettings,
    ParallelismSettings,
    TrainingSettings,
)
from llm_trainer.host.free_space import describe_lack, has_inodes

SHARED_MEMORY_DIR = Path("/dev/shm")
NEARLY_FULL_BYTES = 16 << 20  # with no more than this left, a write that failed without a reason failed for that

GPU_MEMORY = re.compile(r"CUDA error: out of memory|Cuda failure 2 'out of memory'|CUBLAS_STATUS_ALLOC_FAILED")
HOST_MEMORY = re.compile(r"DefaultCPUAllocator: can't allocate|Cannot allocate memory|killed by signal: Killed")
SHARED_MEMORY = re.compile(r"file </torch_|shared memory segment|/dev/shm|Bus error")
NO_SPACE = re.compile(r"No space left on device|Disk quota exceeded")
OVER_QUOTA = re.compile(r"Disk quota exceeded")
FAILED_WRITE = re.compile(r"inline_container|PytorchStreamWriter|iostream error")  # torch.save does not say why
LOST_LOADER = re.compile(r"DataLoader worker .* exited unexpectedly")  # what it says if it noticed before the signal
OLD_DRIVER = re.compile(r"driver on your system is too old|driver version is insufficient")
FOREIGN_GPU = re.compile(r"no kernel image is available")
BROKEN_GPU = re.compile(
    r"uncorrectable (ECC|NVLink) error|fallen off the bus|GPU is lost|hardware stack error|unspecified launch failure"
)
BAD_INDEX = re.compile(r"device-side assert triggered")
FEW_FILES = re.compile(r"Too many open files")
FEW_THREADS = re.compile(r"can't start new thread|pthread_create")
GLOO = re.compile(r"/gloo/|monitoredBarrier|Gloo connect")  # its errors are plain RuntimeErrors
STORE_TIMEOUT = re.compile(r"wait timeout after|Timed out after .* waiting for clients")
OWN_NCCL_ERROR = re.compile(r"ncclInvalid|ncclUnhandledCudaError")

TRACEBACK_PLACE = "the traceback is in the log and in output/data/failures"
SMALL_SHARED_MEMORY = (
    "ran out of shared memory (/dev/shm): set dataloader_num_workers=0; under docker run add --shm-size=8g "
    "(SageMaker has no setting for it)."
)
SAVE_HOST_MEMORY = (
    "use an instance with more memory, or fewer processes (nproc_per_node, dataloader_num_workers) on this one."
)
SAVE_LIMIT = "lower dataloader_num_workers, or raise the limit"
GPU_ADVICE: tuple[tuple[re.Pattern[str], Kind, str], ...] = (
    (
        FOREIGN_GPU,
        "mistake",
        "found a GPU that the image's CUDA code is not made for: use another instance type, or an image for this GPU.",
    ),
    (
        BROKEN_GPU,
        "fault",
        "lost its GPU, whose hardware or driver failed: start the job again, and it goes on from its checkpoint; "
        "where the same host fails again, tell AWS's support.",
    ),
    (
        BAD_INDEX,
        "fault",
        "had an index out of range on the GPU, such as a token that the model has no embedding for: the log above "
        "names the place; check that tokenizer and model belong together.",
    ),
)
UPDATE_DRIVER = "use a newer instance type or AMI, or an image for an older CUDA."
DEATHS: dict[int, str] = {
    signal.SIGKILL: f"most likely because the host ran out of memory: {SAVE_HOST_MEMORY}",
    signal.SIGBUS: f"most likely because it {SMALL_SHARED_MEMORY}",
    signal.SIGABRT: "by a library's own check or, after ddp_timeout, by NCCL's watchdog: the log holds its last lines.",
}


@dataclass(frozen=True)
class JobFacts:
    """Facts of the job that a sentence about a failure may name."""

    model: ModelSettings
    adapter: AdapterSettings
    data: DataSettings
    training: TrainingSettings
    parallelism: ParallelismSettings
    folders: Sequence[Path] = ()  # the job writes to them


def explain(error: BaseException, who: str, facts: JobFacts | None) -> Failure:
    """Return the failure that an exception means for the user. `who` is the failed process, such as "Rank 0"."""
    if isinstance(error, UserError) and not is_disk_full(error):
        # After what PyTorch puts before it where it was raised in a process of a DataLoader.
        sentence = str(error).rpartition(f"{UserError.__module__}.UserError: ")[2]
        return Failure(sentence, "mistake", time.time())
    kind, sentence = diagnose(error, facts)
    return Failure(f"{who} {sentence}", kind, time.time())


def diagnose(error: BaseException, facts: JobFacts | None) -> tuple[Kind, str]:
    """Return what happened, as the end of a sentence. The order matters: a full /dev/shm is also no space left."""
    text = "\n".join(str(link) for link in walk_causes(error))
    return (
        diagnose_memory(error, text, facts)
        or diagnose_disk(error, text, facts.folders if facts is not None else ())
        or diagnose_surroundings(error, text, facts)
        or ("fault", f"failed with {type(error).__name__}: {quote_error(error)} ({TRACEBACK_PLACE}).")
    )


def is_shortage(error: BaseException) -> bool:
    """Tell whether memory or disk ran out, which says nothing of what was computed."""
    text = "\n".join(str(link) for link in walk_causes(error))
    return diagnose_memory(error, text, None) is not None or is_disk_full(error)


def diagnose_memory(error: BaseException, text: str, facts: JobFacts | None) -> tuple[Kind, str] | None:
    """Return the sentence for memory that ran out, on the GPU, of the host, or shared between its processes."""
    if is_a(error, "torch.OutOfMemoryError") or GPU_MEMORY.search(text):
        advice = ", or ".join([*(list_memory_savings(error, facts) if facts else ()), "use a GPU with more memory."])
        return "mistake", f"ran out of GPU memory ({describe_allocation(error)}): {advice}"
    if is_a(error, "builtins.MemoryError") or HOST_MEMORY.search(text):
        return "mistake", f"ran out of the host's memory ({quote_error(error)}): {SAVE_HOST_MEMORY}"
    if SHARED_MEMORY.search(text):
        return "mistake", SMALL_SHARED_MEMORY
    if LOST_LOADER.search(text):
        return "fault", f"lost a DataLoader process, most likely to a lack of memory; or it {SMALL_SHARED_MEMORY}"
    return None


def diagnose_disk(error: BaseException, text: str, folders: Sequence[Path]) -> tuple[Kind, str] | None:
    """Return the sentence for a full disk. The job writes to `folders`."""
    if is_disk_full(error) or FAILED_WRITE.search(text):
        folder = find_written_folder(error, folders)
        if is_disk_full(error) or is_nearly_full(folder):
            if folder == SHARED_MEMORY_DIR:
                return "mistake", SMALL_SHARED_MEMORY
            over_quota = OVER_QUOTA.search(text) is not None or errno.EDQUOT in list_numbers(error)
            return "mistake", describe_lack(folder, over_quota)
    return None


def diagnose_surroundings(error: BaseException, text: str, facts: JobFacts | None) -> tuple[Kind, str] | None:
    """Return the sentence for the GPU's driver, the network, or another rank."""
    if OLD_DRIVER.search(text):
        return "mistake", f"found an NVIDIA driver that is older than the image's CUDA: {UPDATE_DRIVER}"
    for pattern, kind, sentence in GPU_ADVICE:
        if pattern.search(text):
            return kind, sentence
    if limit := find_process_limit(text):
        return "mistake", limit
    if refusal := describe_refusal(error):
        return "mistake", refusal
    refusal = find_refusal(error, "a file that it asked for")
    if refusal:
        return "mistake", f"got no answer of use from the network: {refusal}"
    if is_peer_lost(error, text):
        return "peer", describe_lost_peer(error, facts)
    return None


def describe_refusal(error: BaseException) -> str | None:
    """Return the end of a sentence on a file or folder that is closed to this user; None for any other error."""
    if not isinstance(error, OSError) or not error.filename:
        return None
    place = os.fsdecode(error.filename)
    if error.errno == errno.EROFS:
        return f"may not write {place}, which is on a read-only file system: mount it writable."
    if not isinstance(error, PermissionError):
        return None
    return (
        f"may not open {place} as user {os.getuid()} ({error.strerror}): give that user the right to read and write "
        "it, or run as another user."
    )


def find_process_limit(text: str) -> str | None:
    """Return the end of a sentence on a limit of the container that was reached, and on what to change."""
    if FEW_FILES.search(text):
        return f"ran out of open files: {SAVE_LIMIT} (docker run --ulimit nofile=1048576)."
    if FEW_THREADS.search(text):
        return f"ran out of processes or threads: {SAVE_LIMIT} (docker run --pids-limit=-1)."
    return None


def report_death(rank: int, exit_code: int, timestamp: float) -> None:
    """Leave a worker's death for the launcher, unless the worker said itself why. It was noticed at `timestamp`."""
    folder = Path(os.environ["LLM_TRAINER_SCRATCH"]) / "failures"
    if not (folder / f"rank-{rank}.json").exists():
        report_failure(folder, f"rank-{rank}", explain_death(describe_rank(rank), exit_code, timestamp))


def explain_death(who: str, exit_code: int, timestamp: float) -> Failure:
    """Return the failure of a worker that could not say anything itself. `who` is such as "Rank 0"."""
    # When one rank is gone, NCCL's watchdog aborts those that wait for it, and torchrun terminates the others.
    kind: Kind = "peer" if exit_code in (-signal.SIGABRT, -signal.SIGTERM) else "fault"
    if exit_code < 0:
        number = -exit_code
        has_name = number in list(signal.Signals) and number != signal.SIGKILL  # most real-time signals have none
        name = signal.Signals(number).name if has_name else f"signal {number}"
        reason = f"{who} was killed by {name}, {DEATHS.get(number, 'the log holds its last lines.')}"
    else:
        reason = f"{who} ended with exit code {exit_code}: its error is in the log above."
    return Failure(reason, kind, timestamp)


def is_a(error: BaseException, name: str) -> bool:
    """Tell whether the error, or one that it was raised from, is of a class. Its name is given, to import nothing."""
    classes = [kind for link in walk_causes(error) for kind in type(link).__mro__]
    return name in {f"{kind.__module__}.{kind.__qualname__}" for kind in classes}


def describe_allocation(error: BaseException) -> str:
    """Return the first sentences of CUDA's allocator, such as how much it was asked for, and how much there is."""
    sentences = re.split(r"(?<=\w)\.\s+", quote_error(error))
    return "; ".join(sentences[:3])


def list_memory_savings(error: BaseException, facts: JobFacts) -> Iterator[str]:
    """Yield the settings that reduce GPU memory and are not used yet."""
    training, max_length = facts.training, facts.data.max_length
    activities = {note.activity for link in walk_causes(error) for note in read_notes(link)}
    if EVALUATION in activities and training.per_device_eval_batch_size > 1:
        yield f"lower per_device_eval_batch_size (now {training.per_device_eval_batch_size})"
    elif training.per_device_train_batch_size > 1:
        yield describe_smaller_pieces(training)
    yield f"lower max_length (now {max_length})" if max_length else "set max_length"
    if facts.parallelism.gradient_checkpointing is False:
        yield "set gradient_checkpointing=true"
    if not facts.adapter.use_peft:
        yield "train an adapter (use_peft=true)"
    elif not facts.model.load_in_4bit:
        other = "load_in_8bit" if facts.model.load_in_8bit else "base_compute=fp8" if facts.model.base_compute else ""
        yield f"set load_in_4bit=true{f' instead of {other}' if other else ''}"


def is_disk_full(error: BaseException) -> bool:
    """Tell whether the error, or one that it was raised from, says that a disk or a quota is full."""
    texts = [str(link) for link in walk_causes(error)]
    return bool(list_numbers(error) & {errno.ENOSPC, errno.EDQUOT}) or any(NO_SPACE.search(text) for text in texts)


def list_numbers(error: BaseException) -> set[int | None]:
    """Return the numbers (errno) of the error, and of those that it was raised from."""
    return {getattr(link, "errno", None) for link in walk_causes(error)}


def find_written_folder(error: BaseException, folders: Sequence[Path]) -> Path:
    """Return where a write failed: by the file that the error names, by its notes, or the fullest of the folders.

    Space alone does not tell: some libraries remove what they could not finish.
    """
    causes = list(walk_causes(error))
    for link in causes:
        name = getattr(link, "filename", None)
        if isinstance(name, str) and Path(name).is_absolute():
            return next(folder for folder in Path(name).parents if folder.is_dir())
    for note in (note for link in causes for note in read_notes(link)):
        if note.folder is not None and note.folder.is_dir():
            return note.folder
    candidates = [folder for folder in (*folders, Path(find_temp_dir())) if folder.is_dir()]
    if is_nearly_full(SHARED_MEMORY_DIR):  # it is small in any case
        candidates.append(SHARED_MEMORY_DIR)
    return min(candidates, key=lambda folder: (has_inodes(folder), shutil.disk_usage(folder).free))


def is_nearly_full(folder: Path) -> bool:
    """Tell whether a folder's disk has next to no space left, or no inode for another file."""
    return folder.is_dir() and (shutil.disk_usage(folder).free <= NEARLY_FULL_BYTES or not has_inodes(folder))


def find_temp_dir() -> str:
    """Return the folder for temporary files, though it may be full."""
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:  # none of those that Python tries can be written
        return os.environ.get("TMPDIR", "/tmp")


def is_peer_lost(error: BaseException, text: str) -> bool:
    """Tell whether another rank broke off or did not answer. A download's time-out, say, is neither."""
    if is_a(error, "torch.distributed.DistError"):
        return not OWN_NCCL_ERROR.search(text)
    return bool(GLOO.search(text))


def is_absence(error: BaseException) -> bool:
    """Tell whether a rank waited in vain for others to come to a group of ranks. They meet in torch's store."""
    text = "\n".join(str(link) for link in walk_causes(error))
    return is_a(error, "torch.distributed.DistError") and STORE_TIMEOUT.search(text) is not None


def describe_lost_peer(error: BaseException, facts: JobFacts | None) -> str:
    """Return the end of a sentence about another rank that is lost."""
    limit = "" if facts is None else f" (now {facts.parallelism.ddp_timeout} s)"
    return (
        f"lost the other ranks ({quote_error(error)}): the log of the rank that failed first says why; where none did, "
        f"a step took longer than ddp_timeout{limit}: raise it."
    )


def write_traceback(error: BaseException, file: Path) -> str:
    """Write the traceback to a file of the output. Return its text."""
    text = "".join(traceback.format_exception(error))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text, errors="backslashreplace")
    except OSError as unwritable:  # a full disk is a likely reason to be here; the log has the text as well
        text += f"\n(not written to {file}: {unwritable})\n"
    return text
