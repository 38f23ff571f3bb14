#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Pushes an image under its tags, and writes what the next stage needs to know of it to build/image.json.
#   docker/push.sh IMAGE REPOSITORY VARIANT
# Tags that never move: REVISION-VARIANT, and VERSION-VARIANT where HEAD has the tag vVERSION. One that moves: VARIANT.
set -euo pipefail
cd "$(dirname "$0")/.."
docker=${DOCKER:-docker} image=$1 repository=$2 variant=$3

label() { "$docker" image inspect --format "{{index .Config.Labels \"org.opencontainers.image.$1\"}}" "$image"; }
revision=$(label revision) version=$(label version)
if [[ ! $revision =~ ^[0-9a-f]{40}$ ]]; then
  echo "$image was built from $revision: commit first, as a tag that never moves has to name a commit." >&2
  exit 1
fi
tags=("$revision-$variant")
if [ "$(git tag --points-at "$revision" --list "v$version")" ]; then tags+=("$version-$variant"); fi

for tag in "${tags[@]}" "$variant"; do
  "$docker" tag "$image" "$repository:$tag"
  "$docker" push --quiet "$repository:$tag"
done
uri=$("$docker" image inspect --format '{{join .RepoDigests "\n"}}' "$image" | grep --fixed-strings "$repository@")
mkdir -p build
printf '{"uri": "%s", "digest": "%s", "revision": "%s", "version": "%s", "tags": "%s"}\n' \
  "$uri" "${uri#*@}" "$revision" "$version" "${tags[*]} $variant" >build/image.json
echo "Pushed $uri as ${tags[*]} $variant"
