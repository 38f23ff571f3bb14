#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Has flash-attn's wheel in docker/wheels/: from the cache, else compiled and put there, which takes hours.
#   docker/wheel_cache.sh key        prints the cache's folder for what decides the wheel
#   docker/wheel_cache.sh S3_FOLDER  fetches s3://.../KEY/*.whl, or runs `make flash-attn` and stores its wheel
set -euo pipefail
cd "$(dirname "$0")/.."

archs=${FLASH_ATTN_CUDA_ARCHS:-$(sed -n 's/^ARG FLASH_ATTN_CUDA_ARCHS="\(.*\)"/\1/p' docker/Dockerfile)}

pin() { sed -n "s/^$1==\([^ ;]*\).*/\1/p" "docker/requirements/$2.txt"; }

# Python comes with the base images, whose digests are part of the key.
key() {
  local images
  images=$(sed -n -e 's/^ARG BUILDER_IMAGE=//p' -e 's/^FROM \(.*\) AS base-cuda$/\1/p' docker/Dockerfile)
  images=$(printf '%s\n' "$images" "${BASE_IMAGE:-}" "${BUILDER_IMAGE:-}" | sha256sum | cut -c1-12)
  echo "flash-attn-$(pin flash-attn flash-attn)/torch-$(pin torch cuda)-cuda-$(pin cuda-toolkit cuda)-sm-${archs//;/-}-$images"
}

if [ "${1:-key}" = key ]; then
  key
  exit
fi

folder=${1%/}/$(key)
have_wheel() { compgen -G 'docker/wheels/flash_attn-*.whl' >/dev/null; }
have_wheel || aws s3 cp --only-show-errors --recursive "$folder/" docker/wheels/
if have_wheel; then
  echo "flash-attn: $(cd docker/wheels && ls flash_attn-*.whl), from $folder or at hand"
else
  echo "flash-attn: nothing in $folder: compiling for $archs"
  make flash-attn BUILD_OPTIONS="${BUILD_OPTIONS:-} --build-arg FLASH_ATTN_CUDA_ARCHS=$archs"
  aws s3 cp --only-show-errors --recursive --exclude '*' --include 'flash_attn-*.whl' docker/wheels/ "$folder/"
fi
