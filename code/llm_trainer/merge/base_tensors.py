# SPDX-License-Identifier: Apache-2.0
"""The tensors of a model folder, read from disk a few rows at a time. Those that are quantized are dequantized.

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
    SINGLE_FILE,
    WEIGHTS_INDEX,
    check_weights,
    list_weights,
    read_header,
    unpack_shape,
)

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
    def name(self) -> str:
        """The name of the tensor in the files."""

    @property
    def file(self) -> Path:
        """The file that holds it."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of its numbers, after they are dequantized."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, after it is dequantized."""

    @property
    def is_whole(self) -> bool:
        """True where rows cannot be read apart from the others."""

    def read(self, first: int, last: int) -> torch.Tensor:
        """Return a copy of the rows `first` to before `last`, along the first axis."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in its file as it is."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    is_whole: bool = False

    def read(self, first: int, last: int) -> torch.Tensor:
        """Return a copy of the rows `first` to before `last`, along the first axis."""
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
        """Return a copy of the whole tensor."""
        return self.read(0, count_rows(self.shape))


@dataclass(frozen=True)
class Mxfp4Tensor:
    """Experts of shape (experts, in, out), stored in MXFP4 as blocks (experts, out, groups, 16) and scales."""

    blocks: StoredTensor
    scales: StoredTensor
    dtype: torch.dtype
    is_whole: bool = False

    @property
    def name(self) -> str:
        """The name of the tensor in the files."""
        return self.blocks.name.removesuffix(MXFP4_BLOCKS)

    @property
    def file(self) -> Path:
        """The file that holds it."""
        return self.blocks.file

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, after it is dequantized."""
        num_experts, num_out, num_in = unpack_shape(list(self.blocks.shape))
        return num_experts, num_in, num_out

    def read(self, first: int, last: int) -> torch.Tensor:
        """Return a copy of the rows `first` to before `last`, along the first axis."""
        return convert_moe_packed_tensors(
            self.blocks.read(first, last), self.scales.read(first, last), dtype=self.dtype
        )


@dataclass(frozen=True)
class BitsAndBytesTensor:
    """A matrix that is stored in 4 or 8 bit, with the statistics to undo that."""

    weight: StoredTensor
    statistics: dict[str, StoredTensor]  # by the ends of their names
    is_whole: bool = True

    @property
    def name(self) -> str:
        """The name of the tensor in the files."""
        return self.weight.name

    @property
    def file(self) -> Path:
        """The file that holds it."""
        return self.weight.file

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type of its numbers, after they are dequantized."""
        return self.state.dtype if self.is_4bit else torch.float32

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape, after it is dequantized."""
        return tuple(self.state.shape) if self.is_4bit else self.weight.shape

    @property
    def is_4bit(self) -> bool:
        """True where it is stored in 4 bit rather than in 8."""
        return BNB_8BIT_SCALES not in self.statistics

    @property
    def state(self) -> "QuantState":  # type: ignore[name-defined]  # noqa: F821
        """The statistics of a 4-bit matrix, as bitsandbytes takes them."""
        from bitsandbytes.functional import QuantState

        values = {name: tensor.read_all() for name, tensor in self.statistics.items()}
        return QuantState.from_dict(values, torch.device("cpu"))

    def read(self, first: int, last: int) -> torch.Tensor:
        """Return a copy of the rows `first` to before `last`, along the first axis."""
        from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

        stored = self.weight.read_all()
        if self.is_4bit:
            return dequantize_4bit(stored, self.state)
        return int8_vectorwise_dequant(stored, self.statistics[BNB_8BIT_SCALES].read_all())


@dataclass(frozen=True, eq=False)
class DerivedTensor:
    """A tensor in the place of another, with its type and shape."""

    original: BaseTensor

    @property
    def name(self) -> str:
        """The name of the tensor in the files."""
        return self.original.name

    @property
    def file(self) -> Path:
        """The file that holds it."""
        return self.original.file

    @property
    def dtype(self) -> torch.dtype:
        """The type of its numbers, after they are dequantized."""
        return self.original.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, after it is dequantized."""
        return self.original.shape


@dataclass(frozen=True, eq=False)
class RoundedTensor(DerivedTensor):
    """A matrix as bitsandbytes rounds it when the model is loaded quantized. The adapter was trained on that."""

    quantization: BitsAndBytesConfig
    loaded_dtype: torch.dtype
    is_transposed: bool  # a Conv1D's is quantized as a linear layer's, which lies the other way
    is_whole: bool = True

    def read(self, first: int, last: int) -> torch.Tensor:
        """Return a copy of the rows `first` to before `last`, along the first axis."""
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
    """A tensor whose numbers come with the adapter."""

    values: torch.Tensor
    is_whole: bool = False

    def read(self, first: int, last: int) -> torch.Tensor:
        """Return a copy of the rows `first` to before `last`, along the first axis."""
        return self.values[first:last].clone()


@dataclass(frozen=True, eq=False)
class AddedTensor:
    """A tensor that comes with the adapter, and that the base has none of."""

    name: str
    file: Path  # of the base, in whose place it is written
    values: torch.Tensor
    is_whole: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The type of its numbers."""
        return self.values.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        return tuple(self.values.shape)

    def read(self, first: int, last: int) -> torch.Tensor:
        """Return a copy of the rows `first` to before `last`, along the first axis."""
        return self.values[first:last].clone()


@dataclass(frozen=True, eq=False)
class CopiedTensor(DerivedTensor):
    """The second of two tied tensors, where the checkpoint holds only the first."""

    copy_name: str
    is_whole: bool = False

    @property
    def name(self) -> str:
        """The name of the tensor in the files."""
        return self.copy_name

    def read(self, first: int, last: int) -> torch.Tensor:
        """Return a copy of the rows `first` to before `last`, along the first axis."""
        return self.original.read(first, last)


def count_rows(shape: tuple[int, ...]) -> int:
    """Return the number of rows along the first axis; a scalar is one row."""
    return shape[0] if shape else 1


def list_shards(base: Path) -> list[Path]:
    """Return the files that Transformers would load. Raise UserError when one is missing or broken."""
    if problems := list(check_weights(base)):
        raise UserError(*problems)
    files = list_weights(base)
    if not files:
        raise UserError(f"Model folder {base} has neither {SINGLE_FILE} nor {WEIGHTS_INDEX}: give a model's folder.")
    return files


def list_tensors(shards: Iterable[Path], dtype: torch.dtype) -> list[BaseTensor]:
    """Return the tensors of the files in their order there. MXFP4 becomes `dtype`, whichever file has its scales."""
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
    """Yield the tensors of a file in their order there. Raise UserError for a type that cannot be read."""
    header = read_header(file)
    with file.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
    for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if tensor["dtype"] not in DTYPES:
            raise UserError(f"{file}: {name} is of type {tensor['dtype']}, which cannot be read here.")
        offset = start + tensor["data_offsets"][0]
        yield StoredTensor(name, file, DTYPES[tensor["dtype"]], tuple(tensor["shape"]), offset)


def find_quantization_statistics(name: str, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors that bitsandbytes stores beside a quantized weight, by the ends of their names.

    These are `absmax` and others in 4 bit, and `SCB` in 8 bit. A weight that is not quantized has none.
    """
    scales = stored.get(f"{name.removesuffix('weight')}{BNB_8BIT_SCALES}")
    if scales is not None:
        return {BNB_8BIT_SCALES: scales}
    if not any(f"{name}.{state}" in stored for state in BNB_4BIT_STATES):
        return {}
    ends = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *BNB_4BIT_STATES)
    return {end: stored[f"{name}.{end}"] for end in ends if f"{name}.{end}" in stored}
