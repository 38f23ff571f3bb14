#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs one half of the GPU kit on a machine that `tests/gpu/kit.sh` describes: run correct|fast|peers OUT [OPTION...]
set -euo pipefail
cd "$(dirname "$0")"
readonly half=$1 out=$2 site=${GPU_KIT_SITE:-/tmp/gpu-kit-site}
shift 2

if [ ! -d "$site" ]; then
  python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" wheels/*.whl
fi
export PYTHONPATH="$PWD/code:$PWD/tests/gpu/shim:$site" PYTHONUNBUFFERED=1
mkdir -p "$out"
case $half in
  correct) exec python3 tests/gpu/correct.py --out "$out" "$@" ;;
  fast) exec python3 bench/gpu.py --out "$out" "$@" ;;
  peers)
    if [ -f peers.tar.xz ]; then
      [ -d "$site-peers" ] || python3 -m tarfile --extract peers.tar.xz "$site-peers"
      export GPU_PEERS_SITE="$site-peers/peers"
    fi
    exec python3 bench/gpu_peers.py --out "$out" "$@"
    ;;
  *) echo "run correct|fast|peers OUT: there is no $half" >&2 && exit 2 ;;
esac
