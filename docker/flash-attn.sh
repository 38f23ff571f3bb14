#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Leaves flash-attn's wheel for the active venv's torch in a folder: the one in wheels/ whose tags match, or one compiled
# here (FLASH_ATTN_CUDA_ARCHS, MAX_JOBS, NVCC_THREADS). Without architectures it compiles none. The Dockerfile runs it.
#   flash-attn.sh OUTPUT_FOLDER
set -euo pipefail
docker=$(dirname "$0") output=$1

# The names of flash-attn's own releases: a wheel is good for one torch, one CUDA, one C++ ABI, one Python.
tags=$(python - <<'PYTHON'
import platform, sys, torch
release = torch.__version__.split(".")
python = f"cp{sys.version_info.major}{sys.version_info.minor}"
print(f"cu{torch.version.cuda.split('.')[0]}torch{release[0]}.{release[1]}cxx11abi{str(torch.compiled_with_cxx11_abi()).upper()}"
      f"-{python}-{python}-linux_{platform.machine()}")
PYTHON
)
version=$(sed -n 's/^flash-attn==\([^ ]*\).*/\1/p' "$docker/requirements/flash-attn.txt")
wheel=flash_attn-$version+$tags.whl

mkdir -p "$output"
for found in "$docker"/wheels/flash_attn-*.whl; do
  [ -e "$found" ] || continue
  if [ "$(basename "$found")" = "$wheel" ]; then
    echo "flash-attn: $wheel is at hand"
    exec cp "$found" "$output"
  fi
  echo "flash-attn: $(basename "$found") is left aside, as this image needs $wheel"
done

if [ -z "$FLASH_ATTN_CUDA_ARCHS" ]; then
  echo "flash-attn: left out, as there is no architecture to compile it for"
  exit
fi
echo "flash-attn: compiling $wheel for ${FLASH_ATTN_CUDA_ARCHS}, with ${MAX_JOBS} jobs of ${NVCC_THREADS} threads"
# A folder that is the same every time, as the compiler cache's keys depend on it.
sources=/tmp/flash-attn
mkdir "$sources"
CPATH=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib") + "/nvidia/cu13/include")')
export CPATH
# Otherwise setup.py fetches a wheel that no hash vouches for.
export FLASH_ATTENTION_FORCE_BUILD=TRUE
pip install --quiet --require-hashes -r "$docker/requirements/flash-attn-build.txt"
pip download --quiet --no-deps --no-build-isolation --no-binary :all: --require-hashes --dest "$sources" \
  -r "$docker/requirements/flash-attn.txt"
tar -xzf "$sources"/*.tar.gz -C "$sources" --strip-components 1
FLASH_ATTN_LOCAL_VERSION=${tags%%-*} pip wheel --verbose --no-deps --no-build-isolation --wheel-dir "$output" "$sources"
ccache --show-stats
