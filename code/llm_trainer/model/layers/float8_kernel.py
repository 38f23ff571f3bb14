# SPDX-License-Identifier: Apache-2.0
"""A Triton kernel that scales the rows of a matrix to float8: it reads each number once, and writes a byte for it.

torch.compile makes the same of PyTorch's operations, but compiles anew for other shapes, which each step of rows of
different lengths has. The image can compile Triton's kernels alone.
"""

import torch
import triton
from triton import language as tl

LARGEST = tl.constexpr(448.0)  # of e4m3
SMALLEST_ROW = tl.constexpr(1e-30)


@triton.jit
def scale_row(matrix, numbers, scales, num_columns, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scale the row of this program's number, of at most `width` columns."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, width)
    is_there = columns < num_columns
    values = tl.load(matrix + row * num_columns + columns, mask=is_there, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), axis=0), SMALLEST_ROW) / LARGEST
    tl.store(numbers + row * num_columns + columns, (values / scale).to(tl.float8e4nv), mask=is_there)
    tl.store(scales + row, scale)


def scale_rows_on_gpu(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix (rows, columns) in float8, and the float32 scales (rows, 1) that give its rows back."""
    num_rows, num_columns = matrix.shape
    numbers = torch.empty(num_rows, num_columns, dtype=torch.float8_e4m3fn, device=matrix.device)
    scales = torch.empty(num_rows, 1, dtype=torch.float32, device=matrix.device)
    width = triton.next_power_of_2(num_columns)
    num_warps = min(max(width // 1024, 1), 16)
    if not num_rows:
        return numbers, scales
    with torch.cuda.device_of(matrix):
        scale_row[(num_rows,)](matrix.contiguous(), numbers, scales, num_columns, width=width, num_warps=num_warps)
    return numbers, scales
