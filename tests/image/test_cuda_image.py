# SPDX-License-Identifier: Apache-2.0
"""What the cuda image carries, as far as it shows without a GPU."""

import json
import os

import pytest

pytestmark = pytest.mark.skipif(os.environ.get("VARIANT") != "cuda", reason="VARIANT is not cuda")

MAX_BYTES = 9e9
SITE_PACKAGES = "/opt/llm-trainer/venv/lib/python3*/site-packages"
# The host's driver brings these with `--gpus`.
OF_THE_DRIVER = {"libcuda.so.1", "libnvidia-ml.so.1"}
# Transports for hardware and job managers of other clusters, which their libraries try one after the other.
OF_OTHER_FABRICS = ("libfabric.", "libibverbs.", "libmlx5.", "libmpi.", "liboshmem.", "libpmix.", "librdmacm.", "libuc")
# Modules of every installed distribution, but for private ones and what runs on import.
IMPORT_ALL = """
import importlib, json, setuptools  # before whoever imports distutils
from importlib.metadata import packages_distributions, version
versions, failures = {}, []
for module, distributions in sorted(packages_distributions().items()):
    if module.isidentifier() and not module.startswith("_"):
        try:
            importlib.import_module(module)
        except Exception as error:
            failures.append(f"{module}: {error!r}")
        versions |= {name.lower().replace("_", "-"): version(name) for name in distributions}
print(json.dumps([versions, failures]))
"""
# Where a library looks once Python has loaded the extension that brings it.
LIBRARIES = " ".join(f"{SITE_PACKAGES}/{place}" for place in ("torch/lib", "nvidia/*/lib", "*.libs", "triton/_C"))
UNRESOLVED = f"""
export LD_LIBRARY_PATH=$(ls -d {LIBRARIES} | paste -sd:)
find /opt/llm-trainer/venv -name '*.so*' -type f -print0 | xargs -0 -P 2 -n 50 ldd 2>/dev/null \
  | awk '/^[^ \\t]/ {{ file = $1 }} /not found/ {{ print file, $1 }}' | sort -u
"""
TRITONS_MODULE = f"""
cd /tmp && echo '#include <Python.h>
#include <cuda.h>
int main(void) {{ return CUDA_SUCCESS; }}' > module.c
gcc -shared -fPIC module.c -o module.so -I$(echo {SITE_PACKAGES})/triton/backends/nvidia/include \
  $(python -c 'import sysconfig; print("-I" + sysconfig.get_path("include"))')
"""


@pytest.fixture(scope="session")
def imported(image):
    """The version of every distribution, and what could not be imported, in one process."""
    # GitPython, which MLflow takes where there is a git, raises without one unless told so.
    script = f"GIT_PYTHON_REFRESH=quiet python - <<'END'\n{IMPORT_ALL}\nEND"
    return json.loads(image.run_bash(script).splitlines()[-1])


def test_every_pinned_package_imports(imported):
    versions, failures = imported
    assert failures == []
    assert set(versions) >= {"torch", "transformers", "trl", "peft", "bitsandbytes", "liger-kernel"}


def test_flash_attention_is_built_for_this_torch(image, imported):
    if "flash-attn" not in imported[0]:
        pytest.skip("flash-attn was left out of this image")
    script = "python -c 'import torch, flash_attn_2_cuda; print(torch.__version__, torch.version.cuda)'"
    torch_version, cuda = image.run_bash(script).split()
    release = ".".join(torch_version.split(".")[:2])
    assert imported[0]["flash-attn"].endswith(f"+cu{cuda.split('.')[0]}torch{release}cxx11abitrue")


def test_torch_has_flash_attention_of_its_own(image):
    script = "import inspect, torch; from torch.nn.attention.varlen import varlen_attn as kernel; "
    script += "print(torch.backends.cuda.is_flash_attention_available(), *inspect.signature(kernel).parameters)"
    built, *options = image.run_bash(f"python -c '{script}'").split()
    assert built == "True"
    assert {"window_size", "scale", "enable_gqa"} <= set(options)


def test_bitsandbytes_has_the_libraries_of_this_cuda_only(image):
    script = f"cd {SITE_PACKAGES}/bitsandbytes && ls *.so; python -c 'import torch; print(torch.version.cuda)'"
    *libraries, cuda = image.run_bash(script).split()
    assert libraries == ["libbitsandbytes_cpu.so", f"libbitsandbytes_cuda{cuda.replace('.', '')}.so"]


def test_every_shared_library_finds_what_it_links_to(image):
    missing = [line.split() for line in image.run_bash(UNRESOLVED).splitlines()]
    unexpected = [
        (file, library)
        for file, library in missing
        if library not in OF_THE_DRIVER and not library.startswith(OF_OTHER_FABRICS)
    ]
    assert unexpected == []


def test_no_library_of_cuda_is_there_twice(image):
    names = r"libcu(blas|blasLt|dnn|fft|rand|solver|sparse)\.so.*|libnccl\.so.*|libnvrtc\.so.*"
    files = image.run_bash(f"find / -xdev -regextype posix-extended -regex '.*/({names})' -type f").split()
    libraries = [os.path.basename(file).split(".so")[0] for file in files]
    assert libraries
    assert len(libraries) == len(set(libraries)), files


def test_triton_can_compile_its_module_and_nothing_else_compiles(image):
    image.run_bash(TRITONS_MODULE)
    assert image.run_bash("command -v g++ nvcc make cmake || true") == ""


def test_the_image_is_below_nine_gigabytes(image):
    assert image.inspect()["Size"] < MAX_BYTES
