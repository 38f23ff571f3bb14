#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What the image's tests need around them on a bare machine:
#   engine.sh start          answers when a Docker engine does; starts one, and installs it first, where none runs
#   engine.sh base VARIANT   prints the base image to build on: the Dockerfile's own, or a stand-in made of packages
#   engine.sh builder        prints the image to compile flash-attn in: the Dockerfile's own, or the stand-in with this
#                            machine's CUDA toolkit in it
#   engine.sh compose        has Docker Compose where the SDKs' local mode looks for it
#   engine.sh registry       has Debian's registry, which stands for ECR in tests/codebuild
#   engine.sh stop           ends the engine that `start` started, by its process id, and no other
set -euo pipefail
cd "$(dirname "$0")/../.."

docker=${DOCKER:-docker}
state=.engine
stand_in=llm-trainer-stand-in:bookworm

say() { echo "engine.sh: $*" >&2; }

install() { # install COMMAND PACKAGE...
  command -v "$1" >/dev/null && return
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    say "install $1 first: only root on Debian or Ubuntu has it done here"
    exit 1
  fi
  shift
  say "installing $*"
  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "$@"; } >&2
}

engine_answers() { "$docker" version --format '{{.Server.Version}}' >/dev/null 2>&1; }

start() {
  engine_answers && return
  install dockerd docker.io iptables
  mkdir -p "$state"
  # A session of its own: Ctrl-C in the terminal that ran make leaves the engine up.
  setsid dockerd >"$state/dockerd.log" 2>&1 </dev/null &
  echo $! >"$state/dockerd.pid"
  for _ in $(seq 60); do
    engine_answers && return
    kill -0 "$(cat "$state/dockerd.pid")" 2>/dev/null || break
    sleep 1
  done
  tail -20 "$state/dockerd.log" >&2
  say "the Docker engine did not start: see $state/dockerd.log"
  exit 1
}

stop() {
  [ -e "$state/dockerd.pid" ] || return 0
  local pid
  pid=$(cat "$state/dockerd.pid")
  # The number may be another process's by now.
  if [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = dockerd ]; then
    kill "$pid"
    for _ in $(seq 30); do kill -0 "$pid" 2>/dev/null || break; sleep 1; done
  fi
  rm -f "$state/dockerd.pid"
}

# SDK 2 knows no plugin of a later major version, and takes the command then, as both SDKs do without a plugin.
compose() { [[ $("$docker" compose version 2>/dev/null) = *v2* ]] || install docker-compose docker-compose; }

registry() { install docker-registry docker-registry; }

available() { "$docker" image inspect "$1" >/dev/null 2>&1 || "$docker" pull --quiet "$1" >/dev/null 2>&1; }

base() { # base VARIANT
  local pinned
  pinned=$(awk -v stage="base-$1" '$1 == "FROM" && $4 == stage { print $2 }' docker/Dockerfile)
  if available "$pinned"; then
    echo "$pinned"
  else
    say "$pinned cannot be pulled: building on $stand_in"
    "$docker" image inspect "$stand_in" >/dev/null 2>&1 || build_stand_in "$stand_in" >&2
    echo "$stand_in"
  fi
}

builder() {
  local pinned toolkit
  pinned=$(sed -n 's/^ARG BUILDER_IMAGE=//p' docker/Dockerfile)
  if available "$pinned"; then
    echo "$pinned"
    return
  fi
  toolkit=$(readlink -f "${CUDA_HOME:-/usr/local/cuda}")
  if [ ! -x "$toolkit/bin/nvcc" ]; then
    say "$pinned cannot be pulled, and no CUDA toolkit is here to stand in for it: set CUDA_HOME, or name an image with BUILDER_IMAGE="
    exit 1
  fi
  say "$pinned cannot be pulled: building on $stand_in-devel, with $toolkit in it"
  "$docker" image inspect "$stand_in-devel" >/dev/null 2>&1 \
    || build_stand_in "$stand_in-devel" --customize-hook="copy-in $toolkit /usr/local" \
      --customize-hook="ln -sfn $(basename "$toolkit") \"\$1/usr/local/cuda\"" >&2
  echo "$stand_in-devel"
}

# The same release and the same leaning of documents and translations as the official slim image; beside it only the
# certificate authorities that this machine trusts, without which a build behind an inspecting proxy fetches nothing.
build_stand_in() { # build_stand_in IMAGE [OPTION...]
  local image=$1
  shift
  install mmdebstrap mmdebstrap
  mkdir -p /usr/local/share/ca-certificates
  # shellcheck disable=SC2016 # mmdebstrap's own shell fills in $1
  mmdebstrap --quiet --variant=minbase --include=ca-certificates \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/info/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --customize-hook='copy-in /usr/local/share/ca-certificates /usr/local/share' \
    --customize-hook='chroot "$1" update-ca-certificates' \
    "$@" bookworm - | "$docker" import - "$image"
}

case ${1:-} in
  start | stop | builder | compose | registry) "$1" ;;
  base) base "${2:?VARIANT}" ;;
  *) sed -n '3,10p' "$0"; exit 2 ;;
esac
