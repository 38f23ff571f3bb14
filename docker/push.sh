#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Pushes an image under its tags, and writes what the next stage needs to know of it to build/image.json.
#   docker/push.sh IMAGE REPOSITORY VARIANT
# Tags that never move: REVISION-VARIANT, and VERSION-VARIANT where HEAD has the tag vVERSION. One that moves: VARIANT.
# A commit is pushed once: a later build of it, such as CodeBuild's Retry, leaves the image that is there, which has
# passed the same tests, gives it the tags that it lacks, and tells its digest.
set -euo pipefail
cd "$(dirname "$0")/.."
docker=${DOCKER:-docker} image=$1 repository=$2 variant=$3

label() { "$docker" image inspect --format "{{index .Config.Labels \"org.opencontainers.image.$1\"}}" "$image"; }
uri() { "$docker" image inspect --format '{{join .RepoDigests "\n"}}' "$1" | grep --fixed-strings "$repository@"; }
# What a tag names in the repository; fails where it names nothing yet.
pull() { "$docker" pull --quiet "$repository:$1" >/dev/null 2>&1 && uri "$repository:$1"; }

revision=$(label revision) version=$(label version)
if [[ ! $revision =~ ^[0-9a-f]{40}$ ]]; then
  echo "$image was built from $revision: commit first, as a tag that never moves has to name a commit." >&2
  exit 1
fi
tags=("$revision-$variant")
if [ "$(git tag --points-at "$revision" --list "v$version")" ]; then tags+=("$version-$variant"); fi

if pushed=$(pull "$revision-$variant"); then
  echo "$revision was pushed before: $pushed stays"
  image=$pushed
fi
missing=()
for tag in "${tags[@]}"; do
  if ! named=$(pull "$tag"); then
    missing+=("$tag")
  elif [ "$named" != "$pushed" ]; then
    echo "$repository:$tag is $named, of another commit, and never moves: raise the version and tag the commit with it." >&2
    exit 1
  fi
done

for tag in "${missing[@]}" "$variant"; do
  "$docker" tag "$image" "$repository:$tag"
  "$docker" push --quiet "$repository:$tag"
done
uri=$(uri "$image")
mkdir -p build
printf '{"uri": "%s", "digest": "%s", "revision": "%s", "version": "%s", "tags": "%s"}\n' \
  "$uri" "${uri#*@}" "$revision" "$version" "${tags[*]} $variant" >build/image.json
echo "Pushed $uri as ${tags[*]} $variant"
