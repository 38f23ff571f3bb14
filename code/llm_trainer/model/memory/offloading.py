# SPDX-License-Identifier: Apache-2.0
"""A stand-in for TRL's activation offloading in a traced step: which tensors lie on the device, and when."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakIdKeyDictionary

# TRL's defaults: smaller tensors stay on the device, and the last so many until they are copied.
MIN_BYTES, WINDOW = 1024, 5


@dataclass(frozen=True)
class Moved:
    """A saved tensor in the host's memory: its number among the saved ones, and what it was."""

    number: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class Offload(saved_tensors_hooks):
    """TRL's activation offloading as the device sees it (trl/models/activation_offloading.py, with its defaults).

    - What is moved stays on the device until five more tensors are saved, as it is copied on a stream of its own.
    - What is saved once more in this time stays there until the backward pass: TRL moves no storage twice.
    - What comes back stays until the next operation that gets something back has ended.
    """

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        super().__init__(self.pack, self.unpack)
        self.moved_bytes = self.num_saved = 0
        self.parameters = WeakIdKeyDictionary({tensor.untyped_storage(): None for tensor in parameters})
        self.saved = WeakIdKeyDictionary()  # storage -> place and type -> number of the tensor saved from there
        self.leaving: dict[int, tuple[torch.Tensor, Callable[[], None]]] = {}
        self.returned: list[torch.Tensor] = []  # of the operation that runs
        self.operation: Any = None

    def pack(self, tensor: torch.Tensor) -> Any:
        """Return what autograd keeps of a tensor: itself, or that it is moved."""
        self.num_saved += 1
        number, storage = self.num_saved, tensor.untyped_storage()
        saved = self.saved.setdefault(storage, {})
        place = tensor.storage_offset(), tensor.dtype
        if place in saved:
            saved[place] = number
            return tensor
        if tensor.nbytes < MIN_BYTES or storage in self.parameters:
            return tensor
        spreads = 0 in tensor.stride()  # over a dimension: its storage is copied as it is
        if not spreads and (not tensor.is_contiguous() or place[0]):
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        self.forget_left(number - WINDOW)
        saved[place] = number
        self.leaving[number] = tensor, lambda: saved.pop(place, None) if saved.get(place) == number else None
        self.moved_bytes += storage.nbytes() if spreads else tensor.nbytes
        return Moved(number, tensor.shape, tensor.stride(), tensor.dtype)

    def forget_left(self, last: int) -> None:
        """Release what was moved, up to this number. A storage that was saved again in the meantime is remembered."""
        for number in [number for number in self.leaving if number <= last]:
            release = self.leaving.pop(number)[1]
            release()

    def count_leaving(self) -> int:
        """Return the bytes on the device that are on their way to the host."""
        storages = {tensor.untyped_storage() for tensor, _ in self.leaving.values()}
        return sum(storage.nbytes() for storage in storages)

    def unpack(self, packed: Any) -> torch.Tensor:
        """Return a saved tensor, on the device again."""
        if isinstance(packed, torch.Tensor):
            return packed
        self.note_operation(torch._C._current_autograd_node())
        if packed.number in self.leaving:
            return self.leaving[packed.number][0]
        tensor = torch.empty_strided(packed.shape, packed.stride, dtype=packed.dtype)
        self.returned.append(tensor)
        return tensor

    def note_operation(self, operation: Any) -> None:
        """Have what came back for the operation before this one released when this one ends, or the backward pass."""
        if operation == self.operation:
            return
        if self.operation is None:
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self.returned.clear())
        earlier, self.returned, self.operation = self.returned, [], operation

        def release(*_: Any) -> None:
            earlier.clear()
            self.forget_left(self.num_saved)

        operation.register_hook(release)
