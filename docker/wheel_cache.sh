#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Has flash-attn's wheel in docker/wheels/: from the cache, else compiled and put there, which takes hours.
#   docker/wheel_cache.sh key                 prints the cache's folder for what decides the wheel
#   docker/wheel_cache.sh S3_FOLDER DIGESTS   fetches s3://.../KEY/WHEEL, or runs `make flash-attn` and stores its wheel;
#                                             does nothing where FLASH_ATTN_CUDA_ARCHS is set and empty
# The bucket is not trusted. The wheel's digest and name are in Systems Manager, in the parameter DIGESTS/KEY, which the
# build that compiled the wheel wrote: whoever may write to the bucket alone cannot change what the image is made of.
set -euo pipefail
cd "$(dirname "$0")/.."

archs=${FLASH_ATTN_CUDA_ARCHS-$(sed -n 's/^ARG FLASH_ATTN_CUDA_ARCHS="\(.*\)"/\1/p' docker/Dockerfile)}

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

if [ -z "$archs" ]; then
  echo "flash-attn: left out, as FLASH_ATTN_CUDA_ARCHS names no architecture"
  exit
fi

if [[ ${1:-} != s3://* || ${2:-} != /* ]]; then
  echo "docker/wheel_cache.sh takes the cache's folder, s3://BUCKET/PREFIX, and the path of its digests, /PATH." >&2
  exit 2
fi
folder=${1%/}/$(key) parameter=${2%/}/$(key)
have_wheel() { compgen -G 'docker/wheels/flash_attn-*.whl' >/dev/null; }

# Prints the digest and the name that the compiling build noted, as sha256sum writes them; nothing where there is none yet.
# Any other answer than "there is none" ends the build: it is no reason to compile for hours.
read_digest() {
  local output
  if output=$(aws ssm get-parameter --name "$parameter" --query Parameter.Value --output text 2>&1); then
    [[ $output =~ ^[0-9a-f]{64}\ \ flash_attn-[A-Za-z0-9_.+-]+\.whl$ ]] \
      || { echo "$parameter is no digest and name of a wheel: delete the parameter." >&2; return 1; }
    echo "$output"
  elif [[ $output != *ParameterNotFound* ]]; then
    echo "$output" >&2
    return 1
  fi
}

# Fetches the wheel of this digest and name, out of the build's sight until its digest is right.
fetch() {
  local line=$1 fetched
  fetched=$(mktemp -d)
  if aws s3 cp --only-show-errors "$folder/${line#*  }" "$fetched/" \
    && (cd "$fetched" && sha256sum --check --quiet --strict - <<<"$line"); then
    mv "$fetched/${line#*  }" docker/wheels/
    rm -r "$fetched"
  else
    rm -r "$fetched"
    echo "flash-attn: $folder/${line#*  } is gone, or is not the wheel whose digest is in $parameter. Find out who changed" \
      "it; then delete the parameter, and the next build compiles the wheel anew." >&2
    return 1
  fi
}

if have_wheel; then
  echo "flash-attn: $(cd docker/wheels && ls flash_attn-*.whl), at hand"
  exit
fi
digest=$(read_digest)
if [ "$digest" ]; then
  fetch "$digest"
  echo "flash-attn: ${digest#*  }, from $folder, SHA-256 ${digest%% *}"
else
  echo "flash-attn: no digest in $parameter: compiling for $archs"
  make flash-attn BUILD_OPTIONS="${BUILD_OPTIONS:-} --build-arg FLASH_ATTN_CUDA_ARCHS=$archs"
  digest=$(cd docker/wheels && sha256sum flash_attn-*.whl)
  # The digest last: a build that is cut off between the two compiles again.
  aws s3 cp --only-show-errors "docker/wheels/${digest#*  }" "$folder/"
  aws ssm put-parameter --name "$parameter" --type String --value "$digest" >/dev/null
fi
