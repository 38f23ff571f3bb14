# SPDX-License-Identifier: Apache-2.0
"""Uploads of local channels to S3, each below the digest of its files.

So a channel that is there already is not uploaded again. No later upload changes the data of a job that runs, or that
starts again after a spot interruption. Hidden files stay here.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_trainer.aws.clients import open_client, split_uri
from llm_trainer.common import log
from llm_trainer.common.errors import UserError
from llm_trainer.common.files import compute_digest
from llm_trainer.common.units import show_bytes

DIGEST_CHARACTERS = 16  # of the folder's name in S3


@dataclass(frozen=True)
class LocalChannel:
    """A channel on this machine, with its files by their names below the channel, and where S3 has them."""

    name: str
    files: Mapping[str, Path]
    uri: str


def read_channel(name: str, place: Path, prefix: str) -> LocalChannel:
    """Return a channel of this machine, and its place below an S3 prefix. Every file is read, for the digest.

    Raises UserError where there are no files, or a folder is a link.
    """
    files = {place.name: place} if place.is_file() else list_files(name, place)
    if not files:
        raise UserError(f"Channel {name}: {place} holds no file: name the folder with its data.")
    listing = "".join(f"{key}\0{compute_digest(file)}\n" for key, file in sorted(files.items()))
    digest = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()[:DIGEST_CHARACTERS]
    return LocalChannel(name, files, f"{prefix.rstrip('/')}/{name}/{digest}/")


def list_files(name: str, folder: Path) -> dict[str, Path]:
    """Return the shown files below a folder by their names there. Raises UserError for a link to a folder."""
    files: dict[str, Path] = {}
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        if linked := [each for each in folders if os.path.islink(os.path.join(place, each))]:
            raise UserError(f"Channel {name}: {Path(place, linked[0])} is a link to a folder: put a copy in its place.")
        shown = [Path(place, each) for each in names if not each.startswith(".")]
        files |= {file.relative_to(folder).as_posix(): file for file in shown if file.is_file()}
    return files


def upload_channel(channel: LocalChannel, kms_key: str | None) -> None:
    """Upload the files of a channel that S3 does not have yet, encrypted with a key of KMS if one is named."""
    client = open_client("s3")
    bucket, prefix = split_uri(channel.uri)
    there = list_sizes(client, channel.uri)
    sizes = {key: file.stat().st_size for key, file in channel.files.items()}
    missing = [key for key, size in sizes.items() if there.get(key) != size]
    if not missing:
        log.info(f"Channel {channel.name} is in S3 already: {channel.uri}")
        return
    total = show_bytes(sum(sizes[key] for key in missing))
    log.info(f"Uploading channel {channel.name}: {len(missing)} of {len(sizes)} files, {total}, to {channel.uri}")
    encryption = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": kms_key} if kms_key else {}
    for key in missing:
        client.upload_file(str(channel.files[key]), bucket, f"{prefix}{key}", ExtraArgs=encryption)


def list_sizes(client: Any, uri: str) -> dict[str, int]:
    """Return the bytes of each object below an S3 prefix, by its name there."""
    bucket, prefix = split_uri(uri)
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    found = (each for page in pages for each in page.get("Contents", []))
    return {each["Key"].removeprefix(prefix): each["Size"] for each in found}
