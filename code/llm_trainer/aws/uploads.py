# SPDX-License-Identifier: Apache-2.0
"""Uploads of local channels to S3, each below the digest of its files.

So a channel that is there already is not uploaded again. No later upload changes the data of a job that runs, or that
starts again after a spot interruption. Hidden files stay here.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_trainer.aws.clients import open_client, split_uri
from llm_trainer.common import log
from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.common.files import compute_digest
from llm_trainer.common.units import show_bytes

DIGEST_CHARACTERS = 16  # of the folder's name in S3
MAX_KEY_BYTES = 1024


@dataclass(frozen=True)
class LocalFile:
    """A file of a channel on this machine, as it was when its digest was made."""

    path: Path
    size: int
    changed_ns: int

    def has_changed(self) -> bool:
        """Tell whether the file is another one by now. Raises FileNotFoundError where it is gone."""
        status = self.path.stat()
        return (status.st_size, status.st_mtime_ns) != (self.size, self.changed_ns)


@dataclass(frozen=True)
class LocalChannel:
    """A channel on this machine, with its files by their names below the channel, and where S3 has them."""

    name: str
    files: Mapping[str, LocalFile]
    uri: str


def read_channel(name: str, place: Path, prefix: str) -> LocalChannel:
    """Return a channel of this machine, and its place below an S3 prefix. Every file is read, for the digest.

    Raises UserError where there are no files, and for what cannot be uploaded as it is.
    """
    try:
        paths = {place.name: place} if place.is_file() else list_files(name, place)
        # The state comes first: a file that changes while it is read has changed.
        files = {key: note_state(path) for key, path in sorted(paths.items())}
        digests = {key: compute_digest(file.path) for key, file in files.items()}
    except OSError as error:
        raise UserError(f"Channel {name} cannot be read ({quote_error(error)}): give this user the files.") from error
    if not files:
        raise UserError(f"Channel {name}: {place} holds no file: name the folder with its data.")
    listing = "".join(f"{key}\0{digest}\n" for key, digest in digests.items())
    digest = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()[:DIGEST_CHARACTERS]
    uri = f"{prefix.rstrip('/')}/{name}/{digest}/"
    for key in files:
        check_key(name, key, uri)
    return LocalChannel(name, files, uri)


def note_state(path: Path) -> LocalFile:
    """Return a file with the size and the time by which a change is seen."""
    status = path.stat()
    return LocalFile(path, status.st_size, status.st_mtime_ns)


def list_files(name: str, folder: Path) -> dict[str, Path]:
    """Return the shown files below a folder by their names there.

    Raises UserError for a link to a folder or to nothing, and for a pipe or a socket.
    """
    files: dict[str, Path] = {}
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        if linked := [each for each in folders if os.path.islink(os.path.join(place, each))]:
            raise UserError(f"Channel {name}: {Path(place, linked[0])} is a link to a folder: put a copy in its place.")
        shown = [Path(place, each) for each in names if not each.startswith(".")]
        for file in shown:
            check_file(name, file)
        files |= {file.relative_to(folder).as_posix(): file for file in shown}
    return files


def check_file(name: str, file: Path) -> None:
    """Raise UserError for something in a folder that is no file."""
    if not file.is_file():
        what = "a link to nothing" if file.is_symlink() else "no file"
        raise UserError(f"Channel {name}: {file} is {what}: remove it, or put the file in its place.")


def check_key(name: str, key: str, uri: str) -> None:
    """Raise UserError for a file's name that S3 does not take, or not below so long a prefix."""
    try:
        num_bytes = len(f"{split_uri(uri)[1]}{key}".encode())
    except UnicodeEncodeError:
        raise UserError(f"Channel {name}: the name {key!r} is not UTF-8, as S3 asks: rename the file.") from None
    if num_bytes > MAX_KEY_BYTES:
        raise UserError(
            f"Channel {name}: the name {key!r} has {num_bytes} bytes with its prefix, and S3 takes {MAX_KEY_BYTES}: "
            "shorten it."
        )


def upload_channel(channel: LocalChannel, kms_key: str | None) -> None:
    """Upload the files of a channel that S3 does not have yet, encrypted with a key of KMS if one is named.

    Raises UserError for a bucket of another region, and for a file that changes meanwhile.
    """
    client = open_client("s3")
    check_region(client, channel.uri)
    there = list_sizes(client, channel.uri)
    missing = [key for key, file in channel.files.items() if there.get(key) != file.size]
    if not missing:
        log.info(f"Channel {channel.name} is in S3 already: {channel.uri}")
        return
    total = show_bytes(sum(channel.files[key].size for key in missing))
    log.info(
        f"Uploading channel {channel.name}: {len(missing)} of {len(channel.files)} files, {total}, to {channel.uri}"
    )
    send_files(client, channel, missing, kms_key)


def check_region(client: Any, uri: str) -> None:
    """Raise UserError where a bucket is in another region than the job, which SageMaker refuses."""
    bucket, prefix = split_uri(uri)
    answer = client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
    there, here = answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region"), client.meta.region_name
    if there not in (None, here):
        raise UserError(
            f"Bucket {bucket} is in {there}, and the job in {here}: set AWS_DEFAULT_REGION={there}, or take a bucket "
            f"of {here}; SageMaker reads from no other region."
        )


def send_files(client: Any, channel: LocalChannel, keys: Sequence[str], kms_key: str | None) -> None:
    """Upload files of a channel, several at once. Whatever ends it also ends what is under way."""
    from boto3.s3.transfer import TransferConfig, create_transfer_manager

    bucket, prefix = split_uri(channel.uri)
    encryption = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": kms_key} if kms_key else {}
    with create_transfer_manager(client, TransferConfig()) as manager:
        transfers = {
            key: manager.upload(str(channel.files[key].path), bucket, f"{prefix}{key}", dict(encryption))
            for key in keys
        }
        for key, transfer in transfers.items():
            file = channel.files[key]
            try:
                transfer.result()
                if not file.has_changed():
                    continue
            except FileNotFoundError:
                pass
            # Nobody may take what was sent for the file: an empty one is uploaded again.
            client.put_object(Bucket=bucket, Key=f"{prefix}{key}", Body=b"", **encryption)
            raise UserError(f"Channel {channel.name}: {file.path} changed while it was uploaded: submit the job again.")


def list_sizes(client: Any, uri: str) -> dict[str, int]:
    """Return the bytes of each object below an S3 prefix, by its name there."""
    return {each["Key"].removeprefix(split_uri(uri)[1]): each["Size"] for each in list_objects(client, uri)}


def list_objects(client: Any, uri: str) -> Iterator[dict[str, Any]]:
    """Yield what S3 tells of each object below a prefix."""
    bucket, prefix = split_uri(uri)
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        yield from page.get("Contents", [])
