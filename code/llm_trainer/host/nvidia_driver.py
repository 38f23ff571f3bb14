# SPDX-License-Identifier: Apache-2.0
"""The host's NVIDIA driver, asked through NVML, and cuda-compat for a driver that is older than the image's CUDA.

Loads neither torch nor CUDA: which libcuda the workers load is decided before any of them starts.
"""

import importlib.util
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pynvml

COMPAT_DIR = Path("/usr/local/cuda/compat")


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_bytes: int


@dataclass(frozen=True)
class Driver:
    version: str  # such as 580.95.05; what is before the first point is its branch
    cuda: str | None  # newest CUDA it supports; None where its libcuda is not in the container
    gpus: tuple[Gpu, ...]


@contextmanager
def nvml() -> Iterator[None]:
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def read_driver() -> Driver | None:
    """The driver and its GPUs, or None without a driver. Raises NVMLError when there is one that does not work."""
    try:
        with nvml():
            handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
            return Driver(
                version=pynvml.nvmlSystemGetDriverVersion(),
                cuda=read_driver_cuda(),
                gpus=tuple(
                    Gpu(pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetMemoryInfo(handle).total)
                    for handle in handles
                ),
            )
    except pynvml.NVMLError_LibraryNotFound:
        return None


def read_driver_cuda() -> str | None:
    try:
        version = pynvml.nvmlSystemGetCudaDriverVersion_v2()  # 13000 is 13.0
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_FunctionNotFound):
        return None
    return f"{version // 1000}.{version % 1000 // 10}"


def find_torch_cuda() -> str | None:
    """The CUDA that torch was built with, from torch/version.py; None for a CPU build."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return found[1] if found else None


def find_compat_version(compat_dir: Path = COMPAT_DIR) -> str | None:
    """The driver version that cuda-compat brings, from the name of its libcuda.so.580.95.05."""
    versions = [file.name.removeprefix("libcuda.so.") for file in compat_dir.glob("libcuda.so.*.*")]
    return max(versions, key=branch, default=None)


def branch(version: str) -> int:
    return int(version.partition(".")[0])


def is_compat_usable(driver_version: str, compat_version: str | None) -> bool:
    """Whether cuda-compat gives the workers a newer CUDA than the host's driver does.

    Compares branches, as NVIDIA's container toolkit does: within one the CUDA version is the same, so that compat gains
    nothing, and on GeForce cards, which do not support it, it would break what works (CUDA error 804).
    """
    return compat_version is not None and branch(driver_version) < branch(compat_version)


def driver_variables(variables: Mapping[str, str], compat_dir: Path = COMPAT_DIR) -> dict[str, str]:
    """What to set beside the given variables so that the workers load cuda-compat's libcuda; {} for the host's own."""
    compat_version = find_compat_version(compat_dir)
    if compat_version is None:
        return {}
    try:
        with nvml():
            driver_version = pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        return {}
    if not is_compat_usable(driver_version, compat_version):
        return {}
    earlier = variables.get("LD_LIBRARY_PATH")
    return {"LD_LIBRARY_PATH": f"{compat_dir}:{earlier}" if earlier else str(compat_dir)}
