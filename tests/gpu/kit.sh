#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Gathers in build/gpu-kit what one NVIDIA machine without network needs to try and time this repository:
# `make gpu-kit`. There, in the folder that holds it:
#   build/gpu-kit/run correct OUT     doctor, tests/gpu and whole jobs; writes OUT/correct.json
#   build/gpu-kit/run fast OUT        tokens a second and memory, a variant at a time; writes OUT/fast.json
#   build/gpu-kit/run peers OUT       whole trainers beside each other; writes OUT/peers.json. With PEERS=1 the kit holds
#                                     Unsloth too (15 MB more), without it TRL and this project alone
# The machine has CUDA 13, Python 3.12, torch, triton, pytest, numpy, pyarrow, pandas and psutil of its own.
set -euo pipefail
cd "$(dirname "$0")/../.."

readonly kit=build/gpu-kit
readonly lock=docker/requirements/cuda.txt
readonly cuda=130 # the one library of bitsandbytes that travels

# The lock's pins of the packages that tests/gpu/packages.txt names, each with its hashes.
pick_pins() {
  awk 'NR == FNR { wanted[$1]; next }
    /^[a-z0-9]/ { split($1, name, "=="); taken = name[1] in wanted }
    taken { print }' tests/gpu/packages.txt "$lock"
}

options=(--quiet --quiet --no-deps --require-hashes --only-binary :all: --python-version 3.12 --implementation cp
  --platform manylinux2014_x86_64 --platform manylinux1_x86_64)
for glibc in 5 12 17 24 27 28 31 34 35; do options+=(--platform "manylinux_2_${glibc}_x86_64"); done

fetch_wheels() { # fetch_wheels FOLDER
  pick_pins >"$1/pins.txt"
  .venv/bin/pip download "${options[@]}" --dest "$1/wheels" --requirement "$1/pins.txt"
}

# Installed and packed by xz: as wheels they would be three times as large. Unsloth's desktop application stays here.
pack_peers() { # pack_peers FOLDER
  .venv/bin/pip install "${options[@]}" --no-compile --target "$1/peers" --requirement tests/gpu/peers.txt
  rm -rf "$1/peers/studio" "$1/peers/bin"
  tar --create --xz --file "$1/peers.tar.xz" --directory "$1" peers
  rm -rf "$1/peers"
}

# Of bitsandbytes' libraries, one for each CUDA of the last years, only the one for this CUDA stays: 3 MB of 41.
strip_bitsandbytes() { # strip_bitsandbytes FOLDER
  local wheel
  wheel=$(echo "$1"/wheels/bitsandbytes-*.whl)
  .venv/bin/python - "$wheel" "libbitsandbytes_cuda$cuda.so" <<'PYTHON'
import os, sys, zipfile
wheel, kept = sys.argv[1:]
with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(wheel + ".part", "w", zipfile.ZIP_DEFLATED) as part:
    for entry in whole.infolist():
        library = entry.filename.rpartition("/")[2]
        if not library.endswith(".so") or library in (kept, "libbitsandbytes_cpu.so"):
            part.writestr(entry, whole.read(entry))
os.replace(wheel + ".part", wheel)
PYTHON
}

mkdir -p "$kit"
next=$(mktemp -d "$kit.XXXXXX")
trap 'rm -rf "$next"' EXIT
mkdir "$next/wheels"
fetch_wheels "$next"
strip_bitsandbytes "$next"
if [ -n "${PEERS:-}" ]; then pack_peers "$next"; fi
git ls-files -z code 'bench/gpu*.py' bench/opponents tests/gpu tests/support | xargs -0 cp --parents -t "$next"
cp tests/gpu/run.sh "$next/run"
rm -rf "$kit"
chmod 755 "$next"
mv "$next" "$kit"
du -sh "$kit"
