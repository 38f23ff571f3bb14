# SPDX-License-Identifier: Apache-2.0
"""From an exception, or a signal that killed a worker, to a sentence that says what happened and what to change.

Libraries tell the same thing in many ways. An exception's class decides where it says enough, its text elsewhere.
"""

import errno
import os
import re
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

from llm_trainer.common import redaction
from llm_trainer.common.errors import Failure, Kind, UserError, quote_error, report_failure, walk_causes
from llm_trainer.common.hub import find_refusal
from llm_trainer.common.ranks import describe_rank
from llm_trainer.config.schema import Settings
from llm_trainer.config.sections import SECRETS

SHARED_MEMORY_DIR = Path("/dev/shm")
NEARLY_FULL_BYTES = 16 << 20  # with no more than this left, a write that failed without a reason failed for that

GPU_MEMORY = re.compile(r"CUDA error: out of memory|Cuda failure 2 'out of memory'|CUBLAS_STATUS_ALLOC_FAILED")
HOST_MEMORY = re.compile(r"DefaultCPUAllocator: can't allocate|Cannot allocate memory|killed by signal: Killed")
SHARED_MEMORY = re.compile(r"file </torch_|shared memory segment|/dev/shm|Bus error")
NO_SPACE = re.compile(r"No space left on device|Disk quota exceeded")
FAILED_WRITE = re.compile(r"inline_container|PytorchStreamWriter|iostream error")  # torch.save does not say why
LOST_LOADER = re.compile(r"DataLoader worker .* exited unexpectedly")  # what it says if it noticed before the signal
OLD_DRIVER = re.compile(r"driver on your system is too old|driver version is insufficient")
GLOO = re.compile(r"/gloo/|monitoredBarrier|Gloo connect")  # its errors are plain RuntimeErrors
OWN_NCCL_ERROR = re.compile(r"ncclInvalid|ncclUnhandledCudaError")

WHERE = "the traceback is in the log and in output/data/failures"
SMALL_SHARED_MEMORY = (
    "ran out of shared memory (/dev/shm): set dataloader_num_workers=0; under docker run add --shm-size=8g "
    "(SageMaker has no setting for it)."
)
SAVE_HOST_MEMORY = (
    "use an instance with more memory, or fewer processes (nproc_per_node, dataloader_num_workers) on this one."
)
UPDATE_DRIVER = "use a newer instance type or AMI, or an image for an older CUDA."
DEATHS = {
    signal.SIGKILL: f"most likely because the host ran out of memory: {SAVE_HOST_MEMORY}",
    signal.SIGBUS: f"most likely because it {SMALL_SHARED_MEMORY}",
    signal.SIGABRT: "by a library's own check or, after ddp_timeout, by NCCL's watchdog: the log holds its last lines.",
}


def explain(error: BaseException, who: str, settings: Settings | None, folders: Mapping[str, Path]) -> Failure:
    """`who` is the failed process, such as "Rank 0"; `folders` says where the functions of ours that write do so."""
    if isinstance(error, UserError) and not is_disk_full(error):
        # After what PyTorch puts before it where it was raised in a process of a DataLoader.
        sentence = str(error).rpartition(f"{UserError.__module__}.UserError: ")[2]
        return Failure(hide_secrets(sentence, settings), "mistake", time.time())
    kind, sentence = diagnose(error, settings, folders)
    return Failure(hide_secrets(f"{who} {sentence}", settings), kind, time.time())


def diagnose(error: BaseException, settings: Settings | None, folders: Mapping[str, Path]) -> tuple[Kind, str]:
    """What happened, as the end of a sentence. The order matters: a full /dev/shm is also no space left."""
    text = "\n".join(str(link) for link in walk_causes(error))
    if is_a(error, "torch.OutOfMemoryError") or GPU_MEMORY.search(text):
        return "mistake", f"ran out of GPU memory ({describe_allocation(error)}): {save_gpu_memory(error, settings)}"
    if is_a(error, "builtins.MemoryError") or HOST_MEMORY.search(text):
        return "mistake", f"ran out of the host's memory ({quote_error(error)}): {SAVE_HOST_MEMORY}"
    if SHARED_MEMORY.search(text):
        return "mistake", SMALL_SHARED_MEMORY
    if LOST_LOADER.search(text):
        return "fault", f"lost a DataLoader process, most likely to a lack of memory; or it {SMALL_SHARED_MEMORY}"
    if is_disk_full(error) or FAILED_WRITE.search(text):
        folder = find_written_folder(error, folders)
        if is_disk_full(error) or is_nearly_full(folder):
            return "mistake", SMALL_SHARED_MEMORY if folder == SHARED_MEMORY_DIR else describe_full_disk(folder)
    if OLD_DRIVER.search(text):
        return "mistake", f"found an NVIDIA driver that is older than the image's CUDA: {UPDATE_DRIVER}"
    refusal = find_refusal(error, "a file that it asked for")
    if refusal:
        return "mistake", f"got no answer of use from the network: {refusal}"
    if is_peer_lost(error, text):
        return "peer", describe_lost_peer(error, settings)
    return "fault", f"failed with {type(error).__name__}: {quote_error(error)} ({WHERE})."


def report_death(rank: int, exit_code: int, timestamp: float) -> None:
    """Tell the launcher of a worker's death, unless it said itself why; that was before `timestamp`."""
    folder = Path(os.environ["LLM_TRAINER_SCRATCH"]) / "failures"
    if not (folder / f"rank-{rank}.json").exists():
        report_failure(folder, f"rank-{rank}", explain_death(describe_rank(rank), exit_code, timestamp))


def explain_death(who: str, exit_code: int, timestamp: float) -> Failure:
    """Of a worker that could not say anything itself."""
    # When one rank is gone, NCCL's watchdog aborts those that wait for it, and torchrun terminates the others.
    kind: Kind = "peer" if exit_code in (-signal.SIGABRT, -signal.SIGTERM) else "fault"
    if exit_code < 0:
        killer = signal.Signals(-exit_code)
        name = "signal 9" if killer is signal.SIGKILL else killer.name
        reason = f"{who} was killed by {name}, {DEATHS.get(killer, 'the log holds its last lines.')}"
    else:
        reason = f"{who} ended with exit code {exit_code}: its error is in the log above."
    return Failure(reason, kind, timestamp)


def is_a(error: BaseException, name: str) -> bool:
    """Whether the error, or one that it was raised from, is of the class, named so that nothing is imported for it."""
    classes = [kind for link in walk_causes(error) for kind in type(link).__mro__]
    return name in {f"{kind.__module__}.{kind.__qualname__}" for kind in classes}


def describe_allocation(error: BaseException) -> str:
    """The first sentences of CUDA's allocator, e.g. how much it was asked for, and how much there is."""
    sentences = re.split(r"(?<=\w)\.\s+", quote_error(error))
    return "; ".join(sentences[:3])


def save_gpu_memory(error: BaseException, settings: Settings | None) -> str:
    """The settings that reduce GPU memory and are not used yet."""
    ways = []
    if settings is not None:
        if is_raised_in(error, "evaluation_loop") and settings.training.per_device_eval_batch_size > 1:
            ways.append(f"lower per_device_eval_batch_size (now {settings.training.per_device_eval_batch_size})")
        elif settings.training.per_device_train_batch_size > 1:
            ways.append(
                f"lower per_device_train_batch_size (now {settings.training.per_device_train_batch_size}) and raise "
                f"gradient_accumulation_steps (now {settings.training.gradient_accumulation_steps}) as much"
            )
        ways.append(
            f"lower max_length (now {settings.data.max_length})" if settings.data.max_length else "set max_length"
        )
        if settings.parallelism.gradient_checkpointing is False:
            ways.append("set gradient_checkpointing=true")
        if not settings.adapter.use_peft:
            ways.append("train an adapter (use_peft=true)")
        elif not settings.model.load_in_4bit:
            ways.append(f"set load_in_4bit=true{' instead of load_in_8bit' if settings.model.load_in_8bit else ''}")
    return ", or ".join([*ways, "use a GPU with more memory."])


def is_disk_full(error: BaseException) -> bool:
    numbers = {getattr(link, "errno", None) for link in walk_causes(error)}
    texts = [str(link) for link in walk_causes(error)]
    return bool(numbers & {errno.ENOSPC, errno.EDQUOT}) or any(NO_SPACE.search(text) for text in texts)


def find_written_folder(error: BaseException, folders: Mapping[str, Path]) -> Path:
    """Where the write failed: in the file that the error names, in the folder of the function, or where it is fullest.

    Space alone does not tell: some libraries remove what they could not finish.
    """
    for link in walk_causes(error):
        name = getattr(link, "filename", None)
        if isinstance(name, str) and Path(name).is_absolute():
            return next(folder for folder in Path(name).parents if folder.is_dir())
    for function, folder in folders.items():
        if is_raised_in(error, function) and folder.is_dir():
            return folder
    candidates = [folder for folder in (*folders.values(), Path(tempfile.gettempdir())) if folder.is_dir()]
    if is_nearly_full(SHARED_MEMORY_DIR):  # it is small in any case
        candidates.append(SHARED_MEMORY_DIR)
    return min(candidates, key=lambda folder: shutil.disk_usage(folder).free)


def is_nearly_full(folder: Path) -> bool:
    return folder.is_dir() and shutil.disk_usage(folder).free <= NEARLY_FULL_BYTES


def is_raised_in(error: BaseException, function: str) -> bool:
    frames = [frame for link in walk_causes(error) for frame, _ in traceback.walk_tb(link.__traceback__)]
    return function in {frame.f_code.co_name for frame in frames}


def describe_full_disk(folder: Path) -> str:
    disk = shutil.disk_usage(folder)
    return (
        f"found no space on the disk of {folder}, of which {disk.free / 1e9:.2f} of {disk.total / 1e9:.2f} GB are "
        "free: raise the job's VolumeSizeInGB, or keep fewer checkpoints (save_total_limit)."
    )


def is_peer_lost(error: BaseException, text: str) -> bool:
    """Whether another rank broke off or did not answer. A download's time-out, say, is none of that."""
    if is_a(error, "torch.distributed.DistError"):
        return not OWN_NCCL_ERROR.search(text)
    return bool(GLOO.search(text))


def describe_lost_peer(error: BaseException, settings: Settings | None) -> str:
    limit = "" if settings is None else f" (now {settings.parallelism.ddp_timeout} s)"
    return (
        f"lost the other ranks ({quote_error(error)}): the log of the rank that failed first says why; where none did, "
        f"a step took longer than ddp_timeout{limit}: raise it."
    )


def hide_secrets(text: str, settings: Settings | None) -> str:
    """The text without the secrets that this process knows."""
    given = [settings.value(name) for name in SECRETS] if settings is not None else []
    return redaction.hide_secrets(text, [secret.get_secret_value() for secret in given if secret is not None])


def write_traceback(error: BaseException, file: Path, settings: Settings | None) -> str:
    """The traceback, to the file as well, which leaves the job with the output's other data."""
    text = hide_secrets("".join(traceback.format_exception(error)), settings)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as unwritable:  # a full disk is a likely reason to be here; the log has the text as well
        text += f"\n(not written to {file}: {unwritable})\n"
    return text
