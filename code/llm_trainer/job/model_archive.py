# SPDX-License-Identifier: Apache-2.0
"""A model or an adapter in an archive: SageMaker packs what a job leaves into model.tar.gz, which a next job is given.

It is unpacked once a host, below the folder for temporary files, which SageMaker puts on the job's volume. All
processes of the host find it there.
"""

import bz2
import errno
import gzip
import hashlib
import lzma
import os
import shutil
import tarfile
import tempfile
import zlib
from pathlib import Path
from typing import IO, cast

from llm_trainer.common import log
from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.common.safetensors_files import ADAPTER_CONFIG
from llm_trainer.common.units import show_bytes
from llm_trainer.host.free_space import FIX, describe_lack, find_free_bytes
from llm_trainer.host.kept_folders import publish_folder

SAGEMAKER_ARCHIVE = "model.tar.gz"
ENDINGS = (".tar.gz", ".tgz", ".tar", ".tar.bz2", ".tar.xz")
READ_BYTES = 1 << 20
DAMAGED = (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, RecursionError, ValueError)


def find_archive(place: Path) -> Path | None:
    """Return the archive that a place is or holds, None where there is none to read.

    That is so for a folder with a model or an adapter. Raises UserError for a folder with several archives, none of
    them SageMaker's.
    """
    if os.path.isfile(place):
        return place if place.name.endswith(ENDINGS) else None
    if not os.path.isdir(place) or any((place / name).exists() for name in ("config.json", ADAPTER_CONFIG)):
        return None
    archives = sorted(file for file in place.iterdir() if file.name.endswith(ENDINGS) and file.is_file())
    own = [file for file in archives if file.name == SAGEMAKER_ARCHIVE]
    if len(archives) > 1 and not own:
        names = ", ".join(file.name for file in archives[:3])
        raise UserError(f"Folder {place} holds {len(archives)} archives ({names}): leave one there.")
    return next(iter(own or archives), None)


def unpack_archive(archive: Path) -> Path:
    """Return the folder with an archive's files, unpacked now unless another process has done so.

    Raises UserError for an archive that is damaged, leads out of its folder, or is too large for the disk.
    """
    status = archive.stat()
    key = f"{archive.absolute()} {status.st_size} {status.st_mtime_ns}"
    folder = own_folder() / hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    if folder.is_dir():
        return folder
    log.info(f"Unpacking {archive} ({show_bytes(status.st_size)}) to {folder}")
    unfinished = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder.parent))
    try:
        extract_members(archive, unfinished)
        publish_folder(unfinished, folder)
    except OSError as error:
        lacks = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = describe_lack(unfinished, error.errno == errno.EDQUOT) if lacks else f"failed: {quote_error(error)}."
        raise UserError(f"Unpacking {archive} {reason}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def own_folder() -> Path:
    """Return the folder for unpacked models, which this user alone writes to. Raises UserError if it is another's."""
    folder = Path(tempfile.gettempdir()) / f"llm-trainer-models-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022 or folder.is_symlink():
        raise UserError(f"{folder} belongs to another user, or others may write to it: remove it, or set TMPDIR.")
    return folder


def open_content(archive: Path) -> IO[bytes]:
    """Open an archive's tar stream. By these modules: tarfile itself overlooks a cut end and a wrong checksum."""
    if archive.suffix in (".gz", ".tgz"):
        return cast("IO[bytes]", gzip.open(archive))
    if archive.suffix == ".bz2":
        return cast("IO[bytes]", bz2.open(archive))
    return cast("IO[bytes]", lzma.open(archive)) if archive.suffix == ".xz" else archive.open("rb")


def extract_members(archive: Path, folder: Path) -> None:
    """Unpack an archive into a folder, one member after the other, each where it fits on the disk and stays inside."""
    num_bytes = 0
    try:
        with open_content(archive) as content, tarfile.open(fileobj=content, mode="r|") as tar:
            for member in tar:
                num_bytes += member.size
                free_bytes = find_free_bytes(folder)
                if member.size > free_bytes:
                    raise UserError(
                        f"{archive} unpacks to {show_bytes(num_bytes)} and more, and {show_bytes(free_bytes)} are left "
                        f"in {folder.parent}: {FIX}"
                    )
                tar.extract(member, folder, filter="data")
            while content.read(READ_BYTES):  # to the checksum behind the last member
                pass
    except tarfile.FilterError as error:
        raise UserError(f"{archive} is refused ({quote_error(error)}): pack the model's files alone.") from error
    except DAMAGED as error:
        raise UserError(f"{archive} is no whole tar archive ({quote_error(error)}): upload it again.") from error
