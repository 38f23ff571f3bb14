# SPDX-License-Identifier: Apache-2.0
"""The errors that the pinned libraries really raise, told in a sentence that names the fix.

Those of a GPU cannot be had here: they are real exceptions with the texts of the libraries' sources.
"""

import errno
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import httpx2
import numpy
import pyarrow
import pytest
import torch
import torch.distributed as dist
from datasets import Features, List, Value
from datasets.arrow_writer import ArrowWriter
from safetensors.torch import save_file

from llm_trainer.common.activity_notes import EVALUATION, note_activity
from llm_trainer.common.errors import (
    MAX_FAILURE_CHARACTERS,
    Failure,
    UserError,
    choose_cause,
    quote_error,
    read_failures,
    report_failure,
    reserve_failure,
)
from llm_trainer.config.schema import Settings
from llm_trainer.job.failure_reasons import JobFacts, explain, explain_death, is_absence, write_traceback
from support.small_disk import small_disk, with_shared_memory
from support.waiting import GUARD_SECONDS

CUDA_MEMORY = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.20 GiB is "
    "free. Including non-PyTorch memory, this process has 77.90 GiB memory in use. Of the allocated memory 70.12 GiB "
    "is allocated by PyTorch, and 1.02 GiB is reserved by PyTorch but unallocated. If reserved but unallocated memory "
    "is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
NCCL_PEER = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3356, remote process exited or there was "
    "a network error, NCCL version 2.29.7\nncclRemoteError: A call failed possibly due to a network error or a remote "
    "process exiting prematurely.\nLast error:\nsocketProgress: Connection closed by remote peer algo-2<37312>"
)
NCCL_TIMEOUT = (
    "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=6, OpType=ALLREDUCE, NumelIn=1, "
    "NumelOut=1, Timeout(ms)=1800000) ran for 1800089 milliseconds before timing out."
)
NCCL_MISUSE = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, invalid usage (run with NCCL_DEBUG=WARN for "
    "details), NCCL version 2.29.7\nncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast "
    "error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b0"
)
NCCL_SHARED_MEMORY = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, unhandled system error, NCCL version 2.29.7"
    "\nncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.\nLast "
    "error:\nError while creating shared memory segment /dev/shm/nccl-Xf2a3B (size 9637888), error: No space left"
)


def caught(action, *arguments) -> Exception:
    """The exception that the action raises, with its traceback."""
    with pytest.raises(Exception) as information:
        action(*arguments)
    return information.value


def throw(error: Exception) -> None:
    raise error


def facts_of(settings: Settings, folders: Sequence[Path] = ()) -> JobFacts:
    sections = settings.model, settings.adapter, settings.data, settings.training, settings.parallelism
    return JobFacts(*sections, folders)


def told(error: BaseException, folders: Sequence[Path] = (), **settings) -> Failure:
    """What is told of the error, after a check of what holds for every sentence."""
    failure = explain(error, "Rank 1", facts_of(Settings(**settings), folders))
    assert failure.reason.startswith("Rank 1 ") or isinstance(error, UserError)
    assert len(failure.reason) <= MAX_FAILURE_CHARACTERS
    assert "\n" not in failure.reason
    assert failure.reason.endswith(".")
    return failure


def run_python(program: str, *arguments: object, before: Sequence[str] = ()) -> str:
    """What a program prints of an error of its own: our sentence for it."""
    command = [*before, sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=GUARD_SECONDS, check=False).stdout


# Memory of the GPU


def test_gpu_memory_names_the_settings_that_are_not_used_yet():
    error = torch.OutOfMemoryError(CUDA_MEMORY)
    failure = told(error, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_length=4096)
    assert failure.kind == "mistake"
    assert failure.reason == (
        "Rank 1 ran out of GPU memory (CUDA out of memory; Tried to allocate 20.00 GiB; GPU 0 has a total capacity of "
        "79.11 GiB of which 1.20 GiB is free): lower per_device_train_batch_size (now 4) and raise "
        "gradient_accumulation_steps (now 2) as much, or lower max_length (now 4096), or set load_in_4bit=true, or use "
        "a GPU with more memory."
    )


def test_gpu_memory_does_not_name_what_is_used():
    used = {"per_device_train_batch_size": 1, "load_in_4bit": True, "gradient_checkpointing": True}
    reason = told(torch.OutOfMemoryError(CUDA_MEMORY), **used).reason
    assert "per_device" not in reason
    assert "load_in_4bit" not in reason
    assert "gradient_checkpointing" not in reason


def test_gpu_memory_names_checkpointing_that_is_off_and_an_adapter():
    reason = told(torch.OutOfMemoryError(CUDA_MEMORY), gradient_checkpointing=False, use_peft=False).reason
    assert "set gradient_checkpointing=true, or train an adapter (use_peft=true)" in reason


def test_gpu_memory_in_an_evaluation_names_the_batch_size_of_evaluations():
    def evaluate() -> None:
        with note_activity(EVALUATION):
            raise torch.OutOfMemoryError(CUDA_MEMORY)

    reason = told(caught(evaluate), per_device_train_batch_size=4).reason
    assert "lower per_device_eval_batch_size (now 8)" in reason
    assert "per_device_train_batch_size" not in reason


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.distributed.DistBackendError("ncclUnhandledCudaError: \nLast error:\nCuda failure 2 'out of memory'"),
    ],
)
def test_gpu_memory_that_others_than_the_allocator_miss(error):
    assert "ran out of GPU memory" in told(error).reason


# Memory of the host


@pytest.mark.parametrize(
    "action",
    [
        lambda: torch.empty(10**15),
        lambda: bytearray(10**18),
        lambda: numpy.zeros(10**15),
        lambda: pyarrow.allocate_buffer(10**16),
    ],
    ids=["torch", "python", "numpy", "arrow"],
)
def test_memory_of_the_host(action):
    failure = told(caught(action))
    assert failure.reason.startswith("Rank 1 ran out of the host's memory (")
    assert "use an instance with more memory" in failure.reason


# A DataLoader whose workers die, or whose /dev/shm is small, and what is told of it
LOADER = """
import os, sys, torch
from llm_trainer.job.failure_reasons import explain
class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, number):
        if len(sys.argv) > 1:
            os.kill(os.getpid(), int(sys.argv[1]))
        return torch.zeros(100_000)
try:
    list(torch.utils.data.DataLoader(Rows(), num_workers=2))
except Exception as error:
    print(explain(error, "Rank 1", None).reason)
"""


@pytest.mark.parametrize(("size", "used_bytes"), [("64k", 0), ("4k", 4096)], ids=["too small for a batch", "full"])
def test_a_small_shared_memory_under_a_data_loader(size, used_bytes):
    reason = run_python(LOADER, before=with_shared_memory(size, used_bytes))
    assert reason.startswith("Rank 1 ran out of shared memory (/dev/shm): set dataloader_num_workers=0; under docker")


def test_a_data_loaders_worker_that_dies_of_a_bus_error():
    assert "ran out of shared memory" in run_python(LOADER, int(signal.SIGBUS))


def test_a_data_loaders_worker_that_is_killed():
    reason = run_python(LOADER, int(signal.SIGKILL))
    # Whether PyTorch hears of the signal or of the end first is a race.
    assert reason.startswith(("Rank 1 ran out of the host's memory (DataLoader", "Rank 1 lost a DataLoader process"))
    assert "dataloader_num_workers" in reason


def test_an_error_in_a_data_loaders_worker_is_told_by_its_last_line():
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, number):
            raise IndexError("token 70000 is not in the vocabulary")

    error = caught(list, torch.utils.data.DataLoader(Rows(), num_workers=1))
    assert "failed with IndexError: IndexError: token 70000 is not in the vocabulary (" in told(error).reason


# A full disk


def write_arrow(folder: Path) -> None:
    with ArrowWriter(path=str(folder / "rows.arrow"), features=Features({"ids": List(Value("int32"))})) as writer:
        for _ in range(1000):
            writer.write_batch({"ids": [list(range(1000))]})
        writer.finalize()


WRITERS = {
    "checkpoint": lambda folder: torch.save({"state": torch.zeros(10**6)}, folder / "optimizer.pt"),
    "export": lambda folder: save_file({"weight": torch.zeros(10**6)}, folder / "adapter_model.safetensors"),
    "tokens": write_arrow,
    "text": lambda folder: (folder / "trainer_state.json").write_text("x" * 10**7),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk(writer, tmp_path):
    with small_disk(tmp_path / "disk", 1024) as folder:
        failure = told(caught(WRITERS[writer], folder), [folder, tmp_path])
    assert failure.kind == "mistake"
    assert failure.reason == (
        f"Rank 1 found no space on the disk of {folder} (0.00 of 0.00 GB are free): raise the job's "
        "VolumeSizeInGB, or keep fewer checkpoints (save_total_limit)."
    )


def test_inodes_that_are_used_up_are_no_full_disk(tmp_path):
    def write(folder: Path) -> None:
        for number in range(10_001):
            (folder / str(number)).touch()

    with small_disk(tmp_path / "disk", 1 << 15) as folder:
        failure = told(caught(write, folder), [folder, tmp_path])
        named = OSError(28, "No space left on device")
        assert told(named, [tmp_path, folder]).reason == failure.reason  # the folder is found by its inodes
    assert failure.reason.startswith(f"Rank 1 found no inode on the disk of {folder} for one more file (10,000 are")
    assert "VolumeSizeInGB" not in failure.reason


def test_a_quota_that_is_used_up_is_no_full_disk(tmp_path):
    error = OSError(errno.EDQUOT, "Disk quota exceeded", str(tmp_path / "x"))
    assert told(error).reason.startswith(f"Rank 1 found the quota on {tmp_path} used up (")


def test_a_full_disk_is_named_though_what_filled_it_is_gone(tmp_path):
    def export(folder: Path) -> None:
        with note_activity("writing the result", folder):
            try:
                WRITERS["export"](folder)
            finally:
                (folder / "adapter_model.safetensors").unlink(missing_ok=True)

    with small_disk(tmp_path / "disk", 1024) as folder:
        error = caught(export, folder)
        assert f"no space on the disk of {folder} (" in told(error, [tmp_path]).reason


def test_a_full_disk_inside_what_we_made_a_mistake_of():
    error = UserError("The tokenizer of x could not be loaded (No space left on device).")
    error.__cause__ = OSError(28, "No space left on device", "/tmp/x/blob")
    assert told(error).reason.startswith("Rank 1 found no space on the disk of /tmp (")


def test_a_file_that_torch_cannot_write_for_another_reason_is_no_full_disk(tmp_path):
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    assert told(error, [tmp_path]).kind == "fault"


def test_a_failure_is_reported_on_a_full_disk(tmp_path):
    failure = Failure("Rank 0 found no space on the disk.", "mistake", 1.5)
    with small_disk(tmp_path / "disk", 256) as folder:
        reserve_failure(folder, "rank-0")
        with pytest.raises(OSError):
            (folder / "filler").write_bytes(bytes(10**6))
        report_failure(folder, "rank-0", failure)
        assert read_failures(folder) == [failure]


def test_a_failure_without_a_reserve_on_a_full_disk_is_printed(tmp_path, capsys):
    with small_disk(tmp_path / "disk", 64) as folder:
        with pytest.raises(OSError):
            (folder / "filler").write_bytes(bytes(10**6))
        report_failure(folder, "rank-0", Failure("Rank 0 broke.", "fault", 1.5))
        assert read_failures(folder) == []
    assert capsys.readouterr().err.startswith("Rank 0 broke.\n  This could not be left for the launcher: [Errno 28]")


# Other ranks

SECOND = timedelta(seconds=1)


def lose_the_other_ranks(what: str, rank: int) -> None:
    """Run as one of two ranks, where rank 1 behaves so."""
    # Both start however busy the machine is; what is tested comes after, and has a second.
    dist.init_process_group("gloo", timeout=SECOND if what == "is alone" else timedelta(seconds=500))
    hasty = dist.new_group()
    dist.all_reduce(torch.ones(1), group=hasty)
    dist.distributed_c10d._set_pg_timeout(SECOND, hasty)
    if rank == 1 and what in ("hangs", "is absent"):
        time.sleep(600)
    if rank == 1 and what != "store":
        os._exit(1)
    store = dist.distributed_c10d._get_default_store()
    if what == "is absent":
        dist.distributed_c10d._store_based_barrier(rank, store, "a group", 2, SECOND)
    if what == "store":
        store.set_timeout(SECOND)
        store.get("nothing")
    dist.all_reduce(torch.ones(1), group=hasty)


def run_rank(what: str, rank: int, file: Path) -> None:
    """Leave what the rank tells in the file, and end as a worker that failed does."""
    try:
        lose_the_other_ranks(what, rank)
    except Exception as error:
        failure = explain(error, f"Rank {rank}", None)
        file.write_text(f"{failure.kind} {failure.reason} Absence: {is_absence(error)}.")
    os._exit(1)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def run_ranks(tmp_path, monkeypatch):
    """Runs ranks, and returns what rank 0 tells when rank 1 behaves so."""

    def run(what: str, ranks: tuple[int, ...] = (0, 1)) -> str:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(free_port()))
        monkeypatch.setenv("WORLD_SIZE", "2")
        context, processes = multiprocessing.get_context("fork"), []
        for rank in ranks:  # forked, since a fresh process would import torch for seconds
            monkeypatch.setenv("RANK", str(rank))
            processes.append(context.Process(target=run_rank, args=(what, rank, tmp_path / str(rank))))
            processes[-1].start()
        processes[0].join(GUARD_SECONDS)
        for process in processes[1:]:
            process.kill()
            process.join()
        return (tmp_path / "0").read_text()

    return run


@pytest.mark.parametrize(
    ("what", "text", "is_absent"),
    [
        ("dies", "by peer", False),
        ("hangs", "Timed out waiting", False),  # told by the traces
        ("store", "wait timeout after", True),
        pytest.param("is absent", "store based barrier", True, marks=pytest.mark.long),  # gloo waits ten seconds
    ],
)
def test_a_rank_that(run_ranks, what, text, is_absent):
    told_by_rank_0 = run_ranks(what)
    assert told_by_rank_0.startswith("peer Rank 0 lost the other ranks (")
    assert text in told_by_rank_0
    assert told_by_rank_0.endswith(f"Absence: {is_absent}.")


def test_a_rank_that_never_comes(run_ranks):
    told_by_rank_0 = run_ranks("is alone", ranks=(0,))
    assert told_by_rank_0.startswith("peer Rank 0 lost the other ranks (")
    assert told_by_rank_0.endswith("Absence: True.")


@pytest.mark.parametrize("text", [NCCL_PEER, NCCL_TIMEOUT])
def test_nccl_that_lost_a_peer(text):
    failure = told(torch.distributed.DistBackendError(text), ddp_timeout=1800)
    assert failure.kind == "peer"
    assert "ddp_timeout (now 1800 s)" in failure.reason


def test_nccl_that_is_used_wrongly_is_no_lost_peer():
    assert told(torch.distributed.DistBackendError(NCCL_MISUSE)).kind == "fault"


def test_nccl_without_shared_memory():
    assert "ran out of shared memory" in told(torch.distributed.DistBackendError(NCCL_SHARED_MEMORY)).reason


def test_a_downloads_timeout_is_no_lost_peer():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert told(caught(lambda: httpx2.get(url, timeout=0.1, trust_env=False))).kind == "fault"


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError("timed out"),
        BrokenPipeError(32, "Broken pipe"),
        ConnectionResetError(104, "Connection reset by peer"),
        ConnectionRefusedError(111, "Connection refused"),
    ],
)
def test_other_connections_are_no_lost_peers(error):
    assert told(error).kind == "fault"


# The driver


@pytest.mark.parametrize(
    "text",
    [
        "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by "
        "downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx "
        "Alternatively, go to: https://pytorch.org to install a PyTorch version that has been compiled with your "
        "version of the CUDA driver.",
        "CUDA error: CUDA driver version is insufficient for CUDA runtime version\nSearch for "
        "`cudaErrorInsufficientDriver' in the documentation for more information.",
    ],
)
def test_an_old_driver(text):
    failure = told(RuntimeError(text))
    assert failure.kind == "mistake"
    assert "found an NVIDIA driver that is older than the image's CUDA: use a newer instance type" in failure.reason


# The GPU, and the limits of the container


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        ("CUDA error: no kernel image is available for execution on the device", "mistake", "found a GPU that the"),
        ("CUDA error: uncorrectable ECC error encountered", "fault", "lost its GPU, whose hardware or driver failed"),
        ("CUDA error: unspecified launch failure\nCUDA kernel errors might", "fault", "lost its GPU, whose hardware"),
        ("CUDA error: device-side assert triggered", "fault", "had an index out of range on the GPU"),
        ("ncclUnhandledCudaError: \nCuda failure 214 'uncorrectable ECC error'", "fault", "lost its GPU"),
        ("can't start new thread", "mistake", "ran out of processes or threads: lower dataloader_num_workers, or"),
    ],
)
def test_a_gpu_that_fails_and_a_limit_that_is_reached(error, kind, sentence):
    for failed in (RuntimeError(error), torch.distributed.DistBackendError(error)):
        failure = told(failed)
        assert (failure.kind, failure.reason.startswith(f"Rank 1 {sentence}")) == (kind, True), failure


def test_too_many_open_files(tmp_path):
    program = """
import resource, sys
from llm_trainer.job.failure_reasons import explain
resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
try:
    files = [open(sys.argv[1], "w") for _ in range(99)]
except OSError as error:
    print(explain(error, "Rank 1", None).reason)
"""
    assert run_python(program, tmp_path / "a").startswith("Rank 1 ran out of open files: lower dataloader_num_workers")


# Everything else


def test_an_unknown_error_keeps_its_fix_however_long_it_is():
    failure = told(KeyError("x" * 5000))
    assert failure.kind == "fault"
    assert failure.reason.endswith("... (the traceback is in the log and in output/data/failures).")


def test_an_error_without_a_text():
    assert quote_error(KeyError()) == "KeyError"


@pytest.mark.parametrize(
    ("exit_code", "sentence"),
    [
        (-signal.SIGKILL, "Rank 1 was killed by signal 9, most likely because the host ran out of memory: use an"),
        (-signal.SIGBUS, "Rank 1 was killed by SIGBUS, most likely because it ran out of shared memory (/dev/shm)"),
        (-signal.SIGABRT, "Rank 1 was killed by SIGABRT, by a library's own check or, after ddp_timeout, by NCCL's"),
        (-signal.SIGSEGV, "Rank 1 was killed by SIGSEGV, the log holds its last lines."),
        (-40, "Rank 1 was killed by signal 40, the log holds its last lines."),
        (3, "Rank 1 ended with exit code 3: its error is in the log above."),
    ],
)
def test_a_worker_that_said_nothing(exit_code, sentence):
    assert explain_death("Rank 1", exit_code, 1.0).reason.startswith(sentence)


def test_no_secret_in_a_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_fromEnvironment")
    error = caught(throw, ValueError("Bearer hf_fromEnvironment at https://me:pass-word@host/api"))
    write_traceback(error, tmp_path / "failures" / "rank-0.txt")
    assert "Bearer *** at https://***@host/api" in (tmp_path / "failures" / "rank-0.txt").read_text()


@pytest.mark.parametrize("echo", [signal.SIGABRT, signal.SIGTERM])
def test_what_ends_the_other_ranks_is_not_the_cause(echo):
    cause = explain_death("Rank 0", -signal.SIGKILL, timestamp=2.0)
    assert choose_cause([explain_death("Rank 1", -echo, timestamp=1.0), cause]) is cause
