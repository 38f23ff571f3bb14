# SPDX-License-Identifier: Apache-2.0
"""The tensors of a model folder, read from disk a few rows at a time, and dequantized where they are stored quantized.

Plain reads and no memory map: mapped pages stay in the process's memory until the kernel wants them back.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from transformers import BitsAndBytesConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from llm_trainer.common.errors import UserError
from llm_trainer.common.safetensors_files import (
    MXFP4_BLOCKS,
    MXFP4_SCALES,
    WEIGHTS_INDEX,
    check_weights,
    read_header,
    read_index,
    unpack_shape,
)

SINGLE_FILE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
BNB_4BIT_STATES, BNB_8BIT_SCALES = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4"), "SCB"


class BaseTensor(Protocol):
    """A tensor of the base, as Transformers would have it in memory before any conversion."""

    @property
    def name(self) -> str: ...
    @property
    def file(self) -> Path: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def is_whole(self) -> bool:
        """Whether rows cannot be read apart from the others."""

    def read(self, first: int, last: int) -> torch.Tensor:
        """A copy of the rows from `first` to before `last`, along the first axis."""


@dataclass(frozen=True)
class StoredTensor:
    """One that lies in its file as it is."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    is_whole: bool = False

    def read(self, first: int, last: int) -> torch.Tensor:
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        rows = torch.empty((last - first) * row_bytes, dtype=torch.uint8)
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.offset + first * row_bytes)
            unread = memoryview(rows.numpy())
            while unread:
                count = stream.readinto(unread)
                if not count:
                    raise UserError(f"{self.file} ends within {self.name}: it was changed during the merge.")
                unread = unread[count:]
        return rows.view(self.dtype).reshape((last - first, *self.shape[1:]) if self.shape else ())

    def read_all(self) -> torch.Tensor:
        return self.read(0, count_rows(self.shape))


@dataclass(frozen=True)
class Mxfp4Tensor:
    """Experts (experts, in, out) that are stored as blocks (experts, out, groups, 16) and scales of MXFP4."""

    blocks: StoredTensor
    scales: StoredTensor
    dtype: torch.dtype
    is_whole: bool = False

    @property
    def name(self) -> str:
        return self.blocks.name.removesuffix(MXFP4_BLOCKS)

    @property
    def file(self) -> Path:
        return self.blocks.file

    @property
    def shape(self) -> tuple[int, ...]:
        num_experts, num_out, num_in = unpack_shape(list(self.blocks.shape))
        return num_experts, num_in, num_out

    def read(self, first: int, last: int) -> torch.Tensor:
        return convert_moe_packed_tensors(
            self.blocks.read(first, last), self.scales.read(first, last), dtype=self.dtype
        )


@dataclass(frozen=True)
class BitsAndBytesTensor:
    """A matrix that is stored in 4 or 8 bit with the statistics to undo that."""

    weight: StoredTensor
    statistics: dict[str, StoredTensor]  # by the ends of their names
    is_whole: bool = True

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def file(self) -> Path:
        return self.weight.file

    @cached_property
    def dtype(self) -> torch.dtype:
        return self.state.dtype if self.is_4bit else torch.float32

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.state.shape) if self.is_4bit else self.weight.shape

    @property
    def is_4bit(self) -> bool:
        return BNB_8BIT_SCALES not in self.statistics

    @property
    def state(self) -> "QuantState":  # type: ignore[name-defined]  # noqa: F821
        from bitsandbytes.functional import QuantState

        values = {name: tensor.read_all() for name, tensor in self.statistics.items()}
        return QuantState.from_dict(values, torch.device("cpu"))

    def read(self, first: int, last: int) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

        stored = self.weight.read_all()
        if self.is_4bit:
            return dequantize_4bit(stored, self.state)
        return int8_vectorwise_dequant(stored, self.statistics[BNB_8BIT_SCALES].read_all())


@dataclass(frozen=True, eq=False)
class DerivedTensor:
    """One in the place, and of the type and shape, of another."""

    original: BaseTensor

    @property
    def name(self) -> str:
        return self.original.name

    @property
    def file(self) -> Path:
        return self.original.file

    @property
    def dtype(self) -> torch.dtype:
        return self.original.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.original.shape


@dataclass(frozen=True, eq=False)
class RoundedTensor(DerivedTensor):
    """What bitsandbytes makes of a matrix when the model is loaded quantized: the adapter was trained on that."""

    quantization: BitsAndBytesConfig
    loaded_dtype: torch.dtype
    is_transposed: bool  # a Conv1D's, which is quantized as a linear layer's
    is_whole: bool = True

    def read(self, first: int, last: int) -> torch.Tensor:
        from bitsandbytes import functional

        weight = self.original.read(0, self.shape[0]).to(self.loaded_dtype)
        weight = (weight.T if self.is_transposed else weight).contiguous()
        if self.quantization.load_in_8bit:
            numbers, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
            rounded = functional.int8_vectorwise_dequant(numbers, scales)
        else:
            numbers, state = functional.quantize_4bit(
                weight,
                compress_statistics=self.quantization.bnb_4bit_use_double_quant,
                quant_type=self.quantization.bnb_4bit_quant_type,
            )
            rounded = functional.dequantize_4bit(numbers, state)
        return rounded.T if self.is_transposed else rounded


@dataclass(frozen=True, eq=False)
class ReplacedTensor(DerivedTensor):
    """One whose numbers come with the adapter."""

    values: torch.Tensor
    is_whole: bool = False

    def read(self, first: int, last: int) -> torch.Tensor:
        return self.values[first:last].clone()


@dataclass(frozen=True, eq=False)
class CopiedTensor(DerivedTensor):
    """The other of two tied tensors, of which a checkpoint holds one."""

    copy_name: str
    is_whole: bool = False

    @property
    def name(self) -> str:
        return self.copy_name

    def read(self, first: int, last: int) -> torch.Tensor:
        return self.original.read(first, last)


def count_rows(shape: tuple[int, ...]) -> int:
    return shape[0] if shape else 1


def list_shards(base: Path) -> list[Path]:
    """The files that Transformers would load. Raises UserError when one is missing or broken, or there is none."""
    if problems := list(check_weights(base)):
        raise UserError(*problems)
    names = read_index(base / WEIGHTS_INDEX) or {SINGLE_FILE: set()}
    if not all((base / name).is_file() for name in names):
        raise UserError(f"Model folder {base} has neither {SINGLE_FILE} nor {WEIGHTS_INDEX}: give a model's folder.")
    return [base / name for name in sorted(names)]


def list_tensors(shards: Iterable[Path], dtype: torch.dtype) -> list[BaseTensor]:
    """The tensors of the files in their order there; MXFP4 becomes `dtype`, wherever its blocks lie."""
    stored = {tensor.name: tensor for file in shards for tensor in list_stored_tensors(file)}
    parts: set[str] = set()
    tensors: list[BaseTensor] = []
    for name, tensor in stored.items():
        scales = stored.get(name.removesuffix(MXFP4_BLOCKS) + MXFP4_SCALES) if name.endswith(MXFP4_BLOCKS) else None
        statistics = find_quantization_statistics(name, stored) if tensor.dtype in (torch.uint8, torch.int8) else {}
        if scales is not None:
            tensors.append(Mxfp4Tensor(tensor, scales, dtype))
            parts.add(scales.name)
        elif statistics:
            tensors.append(BitsAndBytesTensor(tensor, statistics))
            parts |= {part.name for part in statistics.values()} | {f"{name}_format"}
        else:
            tensors.append(tensor)
    return [tensor for tensor in tensors if tensor.name not in parts]


def list_stored_tensors(file: Path) -> Iterator[StoredTensor]:
    header = read_header(file)
    with file.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
    for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if tensor["dtype"] not in DTYPES:
            raise UserError(f"{file}: {name} is of type {tensor['dtype']}, which cannot be read here.")
        offset = start + tensor["data_offsets"][0]
        yield StoredTensor(name, file, DTYPES[tensor["dtype"]], tuple(tensor["shape"]), offset)


def find_quantization_statistics(name: str, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """What bitsandbytes stores beside a quantized weight: `weight.absmax` and others in 4 bit, `SCB` in 8 bit."""
    scales = stored.get(f"{name.removesuffix('weight')}{BNB_8BIT_SCALES}")
    if scales is not None:
        return {BNB_8BIT_SCALES: scales}
    if not any(f"{name}.{state}" in stored for state in BNB_4BIT_STATES):
        return {}
    ends = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *BNB_4BIT_STATES)
    return {end: stored[f"{name}.{end}"] for end in ends if f"{name}.{end}" in stored}
