# SPDX-License-Identifier: Apache-2.0
"""Runs a program where torch finds a GPU that is not there: tensors without numbers lie on it, and no kernel runs.

    python fake_gpu.py GUARD PROGRAM ARGUMENT...

GUARD is guard.cpp as a shared library. The torch here has no CUDA of its own.
"""

import ctypes
import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

ANSWERS = {
    "is_available": True,
    "is_bf16_supported": True,
    "device_count": 1,
    "current_device": 0,
    "set_device": None,
    "_exchange_device": 0,
    "_maybe_exchange_device": 0,
    "get_device_capability": (9, 0),
    "get_device_name": "NVIDIA H100 80GB HBM3",
    "get_device_properties": SimpleNamespace(multi_processor_count=132),
}


def load_guard(guard: str) -> None:
    """Load the guard before torch asks whether there is a GPU."""
    libraries = Path(find_spec("torch").origin).parent / "lib"
    ctypes.CDLL(str(libraries / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(guard)


def answer_for_cuda() -> None:
    """Have torch.cuda answer as on an H100."""
    import torch.cuda.amp.common

    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    for name, answer in ANSWERS.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)


if __name__ == "__main__":
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # as a job's launcher does
    sys.modules["bitsandbytes"] = None  # it calls the GPU when it is imported
    if find_spec("flash_attn_2_cuda") is None:  # flash-attn's Python code is followed without its kernels
        sys.modules["flash_attn_2_cuda"] = ModuleType("flash_attn_2_cuda")
    load_guard(sys.argv[1])
    answer_for_cuda()
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
