#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes a virtual environment from hash-locked requirements, after a check of what this machine has.
#   docker/venv.sh              `make venv`: .venv, with torch, the developers' tools and this package
#   docker/venv.sh FOLDER LOCK [OPTION...]  FOLDER from docker/requirements/LOCK.txt alone, with more options of pip
#   docker/venv.sh python       prints the Python that the two above use
# PYTHON names a Python; without it the first of those below that runs is taken.
set -euo pipefail
cd "$(dirname "$0")/.."

# 3.11 first: the image for CPUs has it, and every change is tested with it.
readonly versions=(3.11 3.12 3.13)
readonly requirements=docker/requirements
# Of torch 2.13.0 with all that it needs, in GB: what pip downloads and what lies on the disk afterwards.
readonly linux_download=2.9 linux_disk=4.7 mac_download=0.2 mac_disk=0.6 cpu_download=0.2

say() { echo "$*" >&2; }

# The sentence that ends a message: how PACKAGE of apt-get, or the one of dnf, comes onto this machine.
suggest() { # suggest APT_PACKAGE DNF_PACKAGE
  if command -v apt-get >/dev/null; then
    echo "install it with \`apt-get install $1\`"
  elif command -v dnf >/dev/null; then
    echo "install it with \`dnf install $2\`"
  elif [ "$(uname -s)" = Darwin ]; then
    echo "install it with \`xcode-select --install\`"
  else
    echo "install it with this system's package manager"
  fi
}

# Prints a Python's version, such as 3.12.1. A name that pyenv knows but does not run here counts as absent.
read_version() { "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null; }

is_tested() { [[ " ${versions[*]} " == *" ${1%.*} "* ]]; }

find_python() {
  local candidate version
  if [ -n "${PYTHON:-}" ]; then
    version=$(read_version "$PYTHON") || { say "PYTHON=$PYTHON is no Python that runs here: name another one."; return 1; }
    is_tested "$version" || {
      say "PYTHON=$PYTHON is Python $version, and this project runs on Python 3.11, 3.12 and 3.13: name one of these."
      return 1
    }
    echo "$PYTHON"
    return
  fi
  for candidate in "${versions[@]/#/python}" python3 python; do
    version=$(read_version "$candidate") || continue
    if is_tested "$version"; then
      command -v "$candidate"
      return
    fi
  done
  say "Python 3.11, 3.12 or 3.13 is needed and none is on the PATH: install one, or name one with PYTHON=/path/to/python3.12."
  return 1
}

# The command that compiles Python's extension modules.
find_compiler() {
  local compiler=${CC:-$("$1" -c 'import sysconfig; print(sysconfig.get_config_var("CC") or "cc")')}
  command -v "${compiler%% *}"
}

has_headers() {
  "$1" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'
}

# Names everything that is missing at once, one sentence each.
check_tools() {
  local python=$1 name missing=0
  name=python${2%.*}
  command -v make >/dev/null \
    || { say "make is missing, which every command of this project is a target of: $(suggest make make)."; missing=1; }
  command -v git >/dev/null \
    || { say "git is missing, which tells the lint its files and the image its revision: $(suggest git git)."; missing=1; }
  find_compiler "$python" >/dev/null \
    || { say "A C compiler is missing, with which pip builds sagemaker-training: $(suggest "gcc libc6-dev" gcc)."; missing=1; }
  has_headers "$python" || {
    say "Python.h is missing, with which pip builds sagemaker-training: $(suggest "$name-dev" "$name-devel")."
    missing=1
  }
  "$python" -c 'import ensurepip, venv' 2>/dev/null \
    || { say "Python's venv is missing, which keeps the packages apart: $(suggest "$name-venv" "$name")."; missing=1; }
  return $missing
}

# An environment of another Python is made anew: its packages would stay beside the new ones.
make_folder() {
  local python=$1 folder=$2 version=$3 there
  there=$(read_version "$folder/bin/python") || there=
  if [ "${there%.*}" = "${version%.*}" ]; then
    "$python" -m venv "$folder"
  else
    "$python" -m venv --clear "$folder"
  fi
}

install() { # install FOLDER LOCK [OPTION...]
  local folder=$1 lock=$2
  shift 2
  "$folder/bin/pip" install --no-compile --require-hashes "$@" -r "$requirements/$lock.txt"
}

# The CPU build where pip finds it, else what the index has by torch's plain version.
install_torch() {
  local output
  if output=$(install .venv torch-cpu --quiet --no-deps 2>&1); then
    return
  elif [[ $output != *"No matching distribution found"* ]]; then
    say "$output"
    return 1
  fi
  if [ "$(uname -s)" = Darwin ]; then
    say "torch for macOS follows: $mac_download GB to download, $mac_disk GB on the disk."
  else
    say "pip finds no CPU build of torch here, so the build for NVIDIA's GPUs follows: $linux_download GB to download," \
      "$linux_disk GB on the disk. For the CPU build, of $cpu_download GB, stop with Ctrl-C, set PIP_EXTRA_INDEX_URL to" \
      "PyTorch's CPU wheel index (its address stands in pytorch.org's install command for CPU) or PIP_FIND_LINKS to a" \
      "folder with a wheel of $requirements/torch-cpu.txt, and run \`make venv\` again."
  fi
  install .venv torch
}

main() {
  local python version folder=${1:-.venv}
  python=$(find_python)
  if [ "$folder" = python ]; then
    echo "$python"
    return
  fi
  version=$(read_version "$python")
  check_tools "$python" "$version"
  make_folder "$python" "$folder" "$version"
  install "$folder" build --quiet
  if [ $# = 0 ]; then
    install_torch
    install .venv dev --quiet --no-build-isolation
    .venv/bin/pip install --quiet --no-compile --no-deps --no-build-isolation -e .
  else
    install "$folder" "$2" --quiet --no-build-isolation "${@:3}"
  fi
}

main "$@"
