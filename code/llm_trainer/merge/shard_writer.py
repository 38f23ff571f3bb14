# SPDX-License-Identifier: Apache-2.0
"""Writing of merged tensors as .safetensors files, a few rows at a time, from where an earlier process ended.

Several threads read blocks of rows, sum them in float32, round them once and write them to their places. Memory
therefore depends neither on the model's size nor on a shard's.
"""

import json
import math
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llm_trainer.common import log
from llm_trainer.common.bounded_parsing import read_json
from llm_trainer.common.errors import UserError
from llm_trainer.common.files import rename_durably, write_verbatim
from llm_trainer.common.units import GIB, show_bytes
from llm_trainer.merge.base_tensors import CODES, BaseTensor, count_rows
from llm_trainer.merge.lora_deltas import WeightDelta

# In the output folder. It holds finished shards until all of them are, and the record of their origin.
UNFINISHED = ".llm-trainer-merge"
RECORD = "made_from.json"
BLOCK_NUMBERS = 2**20
MAX_THREADS = 8  # more do not write faster, and each holds some blocks


class Scratch(threading.local):
    """A thread's float32 numbers, used again for every block. Fresh memory costs as much time as the sum itself."""

    def __init__(self) -> None:
        self.numbers = torch.empty(0)

    def hold(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows in float32. They are good until the thread's next call."""
        if rows.numel() > BLOCK_NUMBERS:
            return rows.float()
        if rows.numel() > self.numbers.numel():
            self.numbers = torch.empty(BLOCK_NUMBERS)
        return self.numbers[: rows.numel()].view(rows.shape).copy_(rows)


scratch = Scratch()


@dataclass(frozen=True, eq=False)
class MergedTensor:
    """A tensor of the result: the base's, with a delta where the adapter changes it."""

    name: str
    dtype: torch.dtype
    source: BaseTensor
    delta: WeightDelta | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return self.source.shape

    @property
    def num_bytes(self) -> int:
        """The size of the tensor's numbers in the file, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def list_blocks(self) -> Iterator[tuple[int, int]]:
        """Yield the first row, and the one after the last, of each block that is merged at a time."""
        rows = count_rows(self.shape)
        numbers = math.prod(self.shape[1:])
        is_whole = self.source.is_whole or (self.delta is not None and self.delta.is_whole)
        step = rows if is_whole else max(1, BLOCK_NUMBERS // max(1, numbers))
        for first in range(0, rows, max(1, step)):
            yield first, min(first + step, rows)

    @torch.no_grad()
    def merge(self, first: int, last: int) -> torch.Tensor:
        """Return the rows `first` to before `last` of the result."""
        rows = self.source.read(first, last)
        if self.delta is None:
            return rows.to(self.dtype).contiguous()
        changed = self.delta.add_to(scratch.hold(rows), first, last)
        return rows.copy_(changed) if rows.dtype == self.dtype else changed.to(self.dtype).contiguous()


@dataclass(frozen=True, eq=False)
class MergedShard:
    """A file of the result."""

    file_name: str
    tensors: list[MergedTensor]

    @property
    def num_bytes(self) -> int:
        """The size of the file, in bytes."""
        return len(self.build_header()) + sum(tensor.num_bytes for tensor in self.tensors)

    def list_places(self) -> Iterator[tuple[MergedTensor, int]]:
        """Yield each tensor with the offset of its first byte behind the header.

        Tensors of wider numbers come first, which aligns all of them.
        """
        offset = 0
        for tensor in sorted(self.tensors, key=lambda each: -each.dtype.itemsize):
            yield tensor, offset
            offset += tensor.num_bytes

    def build_header(self) -> bytes:
        """Return the file's header: its length in 8 bytes, and a JSON text (the safetensors format)."""
        described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for tensor, offset in self.list_places():
            described[tensor.name] = {
                "dtype": CODES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.num_bytes],
            }
        text = json.dumps(described, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def write(self, part: Path, pool: ThreadPoolExecutor) -> None:
        """Write the file with the pool's threads. Raise OSError where the disk is full."""
        header = self.build_header()
        with part.open("wb", buffering=0) as stream:
            write_at(stream.fileno(), header, 0)
            written = [
                pool.submit(write_block, stream.fileno(), tensor, first, last, len(header) + offset)
                for tensor, offset in self.list_places()
                for first, last in tensor.list_blocks()
            ]
            try:
                for block in written:
                    block.result()
            finally:
                for block in written:
                    block.cancel()
            os.truncate(part, self.num_bytes)


def write_block(stream: int, tensor: MergedTensor, first: int, last: int, offset: int) -> None:
    """Merge the rows `first` to before `last`, and write them. `offset` is the tensor's first byte in the file."""
    block = tensor.merge(first, last)
    row_bytes = tensor.num_bytes // max(1, count_rows(tensor.shape))
    write_at(stream, block.view(-1).view(torch.uint8).numpy().data, offset + first * row_bytes)


def write_at(stream: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of the data from an offset of the file on. `stream` is a file descriptor."""
    unwritten = memoryview(data)
    while unwritten:
        count = os.pwrite(stream, unwritten, offset)
        unwritten, offset = unwritten[count:], offset + count


@contextmanager
def start_threads() -> Iterator[ThreadPoolExecutor]:
    """Start as many threads as there are cores. Each computes alone in torch, as together they would wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(MAX_THREADS, len(os.sched_getaffinity(0)))) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def claim_output(output: Path, made_from: dict[str, Any]) -> None:
    """Note in the output folder what the shards are made from.

    Raise UserError for a folder with other files, or with shards that are made from something else.
    """
    record = output / UNFINISHED / RECORD
    found = list(output.iterdir()) if output.is_dir() else []
    others = [path.name for path in found if path.name != UNFINISHED or path.is_symlink()]
    if record.parent.is_symlink() or not record.is_file():
        if others:
            raise UserError(f"The output folder {output} is not empty ({sorted(others)[0]}): give a new or empty one.")
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, made_from)
    elif read_json(record) != json.loads(json.dumps(made_from)):
        raise UserError(
            f"The output folder {output} holds an unfinished merge of another base or adapter, or with other options: "
            "remove the folder, or give another one."
        )


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write a value as indented JSON, whole or not at all."""
    write_verbatim(file, json.dumps(value, indent=2) + "\n")


def find_finished(output: Path, shards: list[MergedShard]) -> list[str]:
    """Return the names of the shards that an earlier process wrote whole."""
    names = [shard.file_name for shard in shards]
    return [name for name in names if (output / UNFINISHED / name).is_file() or (output / name).is_file()]


def write_shards(output: Path, shards: list[MergedShard]) -> None:
    """Write the shards that are not there yet into the folder of the unfinished, and log a line for each.

    Raise OSError where the disk is full.
    """
    finished = find_finished(output, shards)
    if finished:
        log.info(f"Merge: {len(finished)} of {len(shards)} shards were merged before")
    waiting = [shard for shard in shards if shard.file_name not in finished]
    left_bytes, done_bytes, started = sum(shard.num_bytes for shard in waiting), 0, time.monotonic()
    with start_threads() as pool, ThreadPoolExecutor(1) as disk:
        settled = []
        for number, shard in enumerate(waiting, start=len(finished) + 1):
            file = output / UNFINISHED / shard.file_name
            shard.write(part := file.with_suffix(".part"), pool)
            settled.append(disk.submit(rename_durably, part, file))  # the disk writes while the next shard is computed
            done_bytes += shard.num_bytes
            seconds = max(time.monotonic() - started, 1e-3)
            wait = (left_bytes - done_bytes) * seconds / done_bytes
            log.info(
                f"Merge: shard {number} of {len(shards)}, {show_bytes(shard.num_bytes)}; "
                f"{done_bytes / GIB / seconds:.2f} GiB/s, {wait:.0f} s to go"
            )
        for shard_on_disk in settled:
            shard_on_disk.result()


def publish_shards(output: Path, shards: list[MergedShard]) -> None:
    """Give the finished shards their places in the output folder."""
    for shard in shards:
        unfinished = output / UNFINISHED / shard.file_name
        if unfinished.is_file():
            unfinished.replace(output / shard.file_name)


def remove_record(output: Path) -> None:
    """Remove the record of an unfinished merge, once the merge is whole."""
    shutil.rmtree(output / UNFINISHED)
