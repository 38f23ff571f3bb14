# SPDX-License-Identifier: Apache-2.0
"""The host's NVIDIA driver, asked through NVML, and cuda-compat for a driver that is older than the image's CUDA.

Neither torch nor CUDA is loaded: the libcuda of the workers is chosen before any of them starts.
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
    """A GPU as the driver describes it."""

    name: str
    memory_bytes: int


@dataclass(frozen=True)
class Driver:
    """An NVIDIA driver, and the GPUs that it drives."""

    version: str  # such as 580.95.05, where 580 is the branch
    cuda: str | None  # newest CUDA it supports; None where its libcuda is not in the container
    gpus: tuple[Gpu, ...]


@contextmanager
def open_nvml() -> Iterator[None]:
    """Open NVML for the block. Raises NVMLError where there is no driver, or one that does not work."""
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def read_driver() -> Driver | None:
    """Return the driver and its GPUs, or None without a driver. Raises NVMLError for one that does not work."""
    try:
        with open_nvml():
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
    """Return the newest CUDA version that the driver supports; None where its libcuda is not in the container."""
    try:
        version = pynvml.nvmlSystemGetCudaDriverVersion_v2()  # 13000 is 13.0
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_FunctionNotFound):
        return None
    return f"{version // 1000}.{version % 1000 // 10}"


def find_torch_cuda() -> str | None:
    """Return the CUDA version that torch was built with, from torch/version.py; None for a CPU build."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return found[1] if found else None


def find_compat_version(compat_dir: Path = COMPAT_DIR) -> str | None:
    """Return the driver version of cuda-compat, from the name of its libcuda.so; None without one."""
    versions = [file.name.removeprefix("libcuda.so.") for file in compat_dir.glob("libcuda.so.*.*")]
    return max(versions, key=parse_major_version, default=None)


def parse_major_version(version: str) -> int:
    """Return the number before the first point: the branch of a driver, the major release of CUDA."""
    return int(version.partition(".")[0])


def is_compat_usable(driver_version: str, compat_version: str | None) -> bool:
    """Tell whether cuda-compat gives the workers a newer CUDA than the host's driver does.

    Branches are compared, as NVIDIA's container toolkit does. Within a branch the CUDA version is the same: compat
    gains nothing, and breaks GeForce cards, which do not support it (CUDA error 804).
    """
    return compat_version is not None and parse_major_version(driver_version) < parse_major_version(compat_version)


def build_driver_variables(variables: Mapping[str, str], compat_dir: Path = COMPAT_DIR) -> dict[str, str]:
    """Return the variables by which workers load cuda-compat's libcuda; {} where they load the host's own."""
    compat_version = find_compat_version(compat_dir)
    if compat_version is None:
        return {}
    try:
        with open_nvml():
            driver_version = pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        return {}
    if not is_compat_usable(driver_version, compat_version):
        return {}
    earlier = variables.get("LD_LIBRARY_PATH")
    return {"LD_LIBRARY_PATH": f"{compat_dir}:{earlier}" if earlier else str(compat_dir)}
