# SPDX-License-Identifier: Apache-2.0
"""The kernel in Triton's interpreter, where Triton is installed. tests/gpu/test_float8.py has it on a GPU."""

import os
import subprocess
import sys

import pytest

COMPARE = """
import torch
from llm_trainer.model.layers.float8 import scale_rows
from llm_trainer.model.layers.float8_kernel import scale_rows_on_gpu

for shape in ((5, 48), (3, 100), (0, 16)):
    wide = torch.randn(shape[0], 2 * shape[1], dtype=torch.bfloat16)
    wide[1:2] = 0
    for matrix in (wide, wide[:, : shape[1]], wide[:, ::2]):
        numbers, scales = scale_rows_on_gpu(matrix)
        expected, expected_scales = scale_rows(matrix)
        torch.testing.assert_close(scales, expected_scales)
        # The interpreter drops what a mantissa carries over when it is rounded up; a GPU does not.
        assert (numbers.float() != expected.float()).sum() <= 0.1 * numbers.numel()
"""


def test_rows_are_scaled_as_pytorch_scales_them():
    pytest.importorskip("triton")
    subprocess.run([sys.executable, "-c", COMPARE], env={**os.environ, "TRITON_INTERPRET": "1"}, check=True)
