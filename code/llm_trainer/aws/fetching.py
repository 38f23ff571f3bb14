# SPDX-License-Identifier: Apache-2.0
"""The results of a job, brought from S3 to this machine and unpacked."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_trainer.aws.clients import open_client, split_uri
from llm_trainer.aws.uploads import list_sizes
from llm_trainer.common import log
from llm_trainer.common.errors import UserError
from llm_trainer.common.files import is_inner_path, replace_file
from llm_trainer.common.units import show_bytes
from llm_trainer.job.model_archive import extract_members

ARCHIVE = ".tar.gz"


def fetch_results(job: Mapping[str, Any], folder: Path) -> list[Path]:
    """Bring all that a job has left below a folder, and return the reports in it.

    What is there already with the same size is not fetched again. Raises UserError where the job has left nothing, or
    an archive is damaged or leads out of the folder.
    """
    place = f"{job['OutputDataConfig']['S3OutputPath'].rstrip('/')}/{job['TrainingJobName']}/output/"
    client = open_client("s3")
    sizes = {name: size for name, size in list_sizes(client, place).items() if name and not name.endswith("/")}
    if not sizes:
        raise UserError(
            f"{place} holds nothing: the job is {job['TrainingJobStatus']}, and leaves its results at its end."
        )
    log.info(f"Fetching {len(sizes)} files, {show_bytes(sum(sizes.values()))}, from {place} to {folder}")
    for name, size in sizes.items():
        fetch_file(client, place, name, find_target(folder, name), size)
    for archive in sorted(folder / name for name in sizes if name.endswith(ARCHIVE)):
        unpack(archive)
    return sorted(folder.rglob("report.html"))


def find_target(folder: Path, name: str) -> Path:
    """Return where an object goes below a folder. Raises UserError for a name that leads out of it."""
    if not is_inner_path(name):
        raise UserError(f"The object {name!r} leads out of {folder}: it is none that a job leaves; remove it from S3.")
    return folder / name


def fetch_file(client: Any, place: str, name: str, target: Path, size: int) -> None:
    """Download an object, whole or not at all, unless a file of its size is there."""
    if target.is_file() and target.stat().st_size == size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    bucket, prefix = split_uri(place)
    with replace_file(target) as unfinished:
        client.download_file(bucket, f"{prefix}{name}", str(unfinished))


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
