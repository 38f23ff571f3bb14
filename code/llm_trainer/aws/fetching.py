# SPDX-License-Identifier: Apache-2.0
"""The results of a job, brought from S3 to this machine and unpacked."""

import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_trainer.aws.clients import open_client, split_uri
from llm_trainer.aws.uploads import list_objects
from llm_trainer.common import log
from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.common.files import is_inner_path, replace_file
from llm_trainer.common.units import show_bytes
from llm_trainer.host.free_space import find_free_bytes
from llm_trainer.job.model_archive import extract_members

ARCHIVE = ".tar.gz"


@dataclass(frozen=True)
class Artefact:
    """An object that a job has left, and the file that it becomes here."""

    key: str  # in its bucket
    target: Path
    size: int
    changed: float  # seconds since 1970, which the file here gets too

    def is_here(self) -> bool:
        """Tell whether it was fetched before. Raises UserError where another file has its place."""
        if not os.path.lexists(self.target):
            return False
        status = self.target.lstat()
        if (stat.S_ISREG(status.st_mode), status.st_size, int(status.st_mtime)) == (True, self.size, int(self.changed)):
            return True
        raise UserError(
            f"{self.target} is there, and is not the job's: remove it, or name another folder with --output."
        )


def fetch_results(job: Mapping[str, Any], folder: Path) -> list[Path]:
    """Bring all that a job has left below a folder, and return the reports in it.

    What was fetched before is not fetched again. Raises UserError where the job has left nothing, for other files in
    the way, and for a small disk. A damaged archive, or one that leads out of the folder, raises it too.
    """
    place = f"{job['OutputDataConfig']['S3OutputPath'].rstrip('/')}/{job['TrainingJobName']}/output/"
    client = open_client("s3")
    artefacts = list(list_artefacts(client, place, folder))
    if not artefacts:
        raise UserError(
            f"{place} holds nothing: the job is {job['TrainingJobStatus']}, and leaves its results at its end."
        )
    try:
        fetch_missing(client, place, artefacts, folder)
        for artefact in artefacts:
            if artefact.target.name.endswith(ARCHIVE):
                unpack(artefact.target)
    except OSError as error:
        raise UserError(f"The results cannot be written to {folder} ({quote_error(error)}): name another.") from error
    return sorted(folder.rglob("report.html"))


def list_artefacts(client: Any, place: str, folder: Path) -> Iterator[Artefact]:
    """Yield each object below an S3 prefix with its file below a folder."""
    prefix = split_uri(place)[1]
    for each in list_objects(client, place):
        name = each["Key"].removeprefix(prefix)
        if name and not name.endswith("/"):
            yield Artefact(each["Key"], find_target(folder, name), each["Size"], each["LastModified"].timestamp())


def find_target(folder: Path, name: str) -> Path:
    """Return where an object goes below a folder. Raises UserError for a name that leads out of it."""
    if not is_inner_path(name):
        raise UserError(f"The object {name!r} leads out of {folder}: it is none that a job leaves; remove it from S3.")
    return folder / name


def fetch_missing(client: Any, place: str, artefacts: Sequence[Artefact], folder: Path) -> None:
    """Download what is not here yet. Raises UserError where the disk has no room for it."""
    missing = [artefact for artefact in artefacts if not artefact.is_here()]
    num_bytes = sum(artefact.size for artefact in missing)
    log.info(f"Fetching {len(missing)} of {len(artefacts)} files, {show_bytes(num_bytes)}, from {place} to {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    free_bytes = find_free_bytes(folder)
    if num_bytes > free_bytes:
        raise UserError(
            f"The results have {show_bytes(num_bytes)}, and {show_bytes(free_bytes)} are free in {folder}: name a "
            "folder on a larger disk with --output."
        )
    for artefact in missing:
        fetch_file(client, split_uri(place)[0], artefact)


def fetch_file(client: Any, bucket: str, artefact: Artefact) -> None:
    """Download an object, whole or not at all."""
    artefact.target.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(artefact.target) as unfinished:
        client.download_file(bucket, artefact.key, str(unfinished))
        os.utime(unfinished, (artefact.changed, artefact.changed))


def unpack(archive: Path) -> None:
    """Unpack an archive into the folder of its name beside it, whole or not at all, unless that is there."""
    folder = archive.with_name(archive.name.removesuffix(ARCHIVE))
    if folder.exists():
        return
    unfinished = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        extract_members(archive, unfinished)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
