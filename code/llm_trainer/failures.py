# SPDX-License-Identifier: Apache-2.0
"""From an exception, or a signal that killed a worker, to a sentence that says what happened and what to change."""

import errno
import os
import re
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from llm_trainer.errors import Failure, UserError
from llm_trainer.settings import SECRETS, Settings, redact_value

FULL_DISK_BYTES = 64 << 20
SHARED_MEMORY = re.compile(r"shared memory|/dev/shm|Bus error|unable to (open|write to) file </torch_", re.IGNORECASE)
HOST_MEMORY = re.compile(r"DefaultCPUAllocator|can't allocate memory|Cannot allocate memory", re.IGNORECASE)
PEER = re.compile(
    r"closed by peer|reset by peer|Broken pipe|NCCL (error|communicator)|ncclRemoteError|Socket Timeout|timed out|"
    r"Timed out waiting|Connection refused|Watchdog caught collective",
    re.IGNORECASE,
)
OLD_DRIVER = re.compile(r"driver .{0,60}(too old|insufficient)", re.IGNORECASE)
NO_ACCESS = re.compile(
    r"gated repo|\b401\b|\b403\b|Unauthorized|Invalid (user )?token|Access to model .* is restricted"
)
WRITE_FAILED = re.compile(
    r"No space left|PytorchStreamWriter|inline_container|unexpected pos|Disk quota", re.IGNORECASE
)

SMALL_SHARED_MEMORY = (
    "ran out of shared memory (/dev/shm): set dataloader_num_workers=0; under docker run add --shm-size=8g "
    "(SageMaker has no setting for it)."
)


def explain(error: BaseException, who: str, settings: Settings | None, folders: list[Path]) -> Failure:
    """`who` is the failed process, such as "Rank 0"; `folders` are those that a job writes to."""
    now = time.time()
    if isinstance(error, UserError):
        return Failure(str(error), "mistake", now)
    text = " | ".join(f"{type(link).__name__}: {link}" for link in chain(error))
    links = {type(link).__name__ for link in chain(error)}
    if "OutOfMemoryError" in links:
        return Failure(
            f"{who} ran out of GPU memory ({first_sentence(error)}): {save_memory(settings)}", "mistake", now
        )
    if "MemoryError" in links or HOST_MEMORY.search(text):
        return Failure(f"{who} ran out of the host's memory: {save_host_memory()}", "mistake", now)
    if SHARED_MEMORY.search(text):
        return Failure(f"{who} {SMALL_SHARED_MEMORY}", "mistake", now)
    full = find_full_disk(error, text, folders)
    if full:
        return Failure(f"{who} found the disk full: {full}", "mistake", now)
    if OLD_DRIVER.search(text):
        return Failure(f"{who}: the NVIDIA driver is older than the image's CUDA: {UPDATE_DRIVER}", "mistake", now)
    if NO_ACCESS.search(text):
        return Failure(
            f"{who} may not read a file of the Hugging Face Hub ({shorten(error)}): {GIVE_TOKEN}", "mistake", now
        )
    if "DistBackendError" in links or "DistNetworkError" in links or "DistStoreError" in links or PEER.search(text):
        return Failure(
            f"{who} lost its connection to the other ranks ({shorten(error)}): the rank that failed first, in the log, "
            "says why; where none did, a step took longer than ddp_timeout.",
            "peer",
            now,
        )
    return Failure(f"{who} failed with {type(error).__name__}: {error} ({WHERE})", "fault", now)


WHERE = "traceback in the log and in output/data/failures"
UPDATE_DRIVER = "use a newer instance type or AMI, or an image for an older CUDA."
GIVE_TOKEN = "accept the model's licence on its Hub page, and give a token that may read it as HF_TOKEN in Environment."


def explain_death(who: str, exit_code: int, timestamp: float) -> Failure:
    """Of a worker that could not say anything itself."""
    if exit_code == -signal.SIGKILL:
        return Failure(
            f"{who} was killed by signal 9, most likely because the host ran out of memory: {save_host_memory()}",
            "fault",
            timestamp,
        )
    if exit_code == -signal.SIGBUS:
        return Failure(f"{who} was killed by SIGBUS, most likely because it {SMALL_SHARED_MEMORY}", "fault", timestamp)
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        return Failure(f"{who} was killed by {name}: the log above holds its last lines.", "fault", timestamp)
    return Failure(f"{who} ended with exit code {exit_code}: the log above holds its error.", "fault", timestamp)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def save_host_memory() -> str:
    return "use an instance with more memory, or fewer worker processes (nproc_per_node)."


def save_memory(settings: Settings | None) -> str:
    """The settings that reduce GPU memory and are not used yet."""
    if settings is None:
        return "use a GPU with more memory."
    ways = []
    if settings.per_device_train_batch_size > 1:
        ways.append(
            f"lower per_device_train_batch_size (now {settings.per_device_train_batch_size}) and raise "
            "gradient_accumulation_steps as much"
        )
    ways.append(f"lower max_length (now {settings.max_length})")
    if settings.gradient_checkpointing is False:
        ways.append("set gradient_checkpointing=true")
    if not settings.use_peft:
        ways.append("train an adapter (use_peft=true)")
    elif not settings.load_in_4bit:
        ways.append("set load_in_4bit=true")
    return ", ".join(ways) + ", or use a GPU with more memory."


def find_full_disk(error: BaseException, text: str, folders: list[Path]) -> str | None:
    """Which disk is full, if that is what the error is about: libraries report it in many ways."""
    numbers = {getattr(link, "errno", None) for link in chain(error)}
    if not numbers & {errno.ENOSPC, errno.EDQUOT} and not WRITE_FAILED.search(text):
        return None
    existing = [folder for folder in [*folders, Path(tempfile.gettempdir())] if folder.is_dir()]
    free = {folder: shutil.disk_usage(folder).free for folder in existing}
    fullest = min(free, key=lambda folder: free[folder], default=None)
    if fullest is None or (free[fullest] > FULL_DISK_BYTES and not numbers & {errno.ENOSPC, errno.EDQUOT}):
        return None
    return (
        f"{fullest} has {free[fullest] / 1e9:.2f} GB left: raise the job's VolumeSizeInGB, or lower save_total_limit."
    )


def first_sentence(error: BaseException) -> str:
    return re.split(r"(?<=[a-z])\. ", str(error).strip().splitlines()[0])[0] if str(error).strip() else ""


def shorten(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]


def hide_secrets(text: str, settings: Settings | None) -> str:
    """The text without the tokens that this process knows."""
    secrets = [os.environ.get("HF_TOKEN"), os.environ.get("WANDB_API_KEY")]
    if settings is not None:
        given = [getattr(settings, name) for name in SECRETS]
        secrets += [secret.get_secret_value() for secret in given if secret is not None]
    for secret in filter(None, secrets):
        text = text.replace(secret, redact_value(SECRETS[0], secret))
    return text


def write_traceback(error: BaseException, file: Path, settings: Settings | None) -> str:
    """The traceback, to the file as well, which leaves the job with the output's other data."""
    text = hide_secrets("".join(traceback.format_exception(error)), settings)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as unwritable:  # a full disk is a likely reason to be here; the log has the text as well
        text += f"\n(not written to {file}: {unwritable})\n"
    return text
