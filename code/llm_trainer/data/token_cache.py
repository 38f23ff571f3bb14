# SPDX-License-Identifier: Apache-2.0
"""Cache on disk of each source's tokens: made now, or by an earlier job with the same files, model and settings."""

import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
import trl

import llm_trainer
from llm_trainer.common import log
from llm_trainer.common.activity_notes import note_activity
from llm_trainer.common.files import remove_path, write_verbatim
from llm_trainer.config.sections import DataSettings
from llm_trainer.data.encoding import Encoder, Vocabulary
from llm_trainer.data.report import REJECTED_ROWS, DataReport
from llm_trainer.data.streaming import SourceHead
from llm_trainer.data.tokenize import CHUNK_ROWS, Preparer, find_format, prepare_chunks, write_chunks
from llm_trainer.host.sealed_folders import (
    find_damage,
    hold_folder,
    make_private_folder,
    remove_oldest,
    seal_folder,
    sync,
)
from llm_trainer.readers.rows import Chunk, DamagedFile
from llm_trainer.readers.sources import FileSource, Source

MAX_SHARE_OF_DISK = 0.2  # what all kept tokens may take; the oldest go first
ROWS, REPORT = "rows.arrow", "report.json"
# Files of this package that decide what tokens a row becomes. A test compares them with what the cache imports.
CODE_THAT_DECIDES_TOKENS = (
    *("readers/rows.py", "readers/json.py", "readers/tables.py", "readers/files.py", "readers/discovery.py"),
    *("readers/sources.py", "data/formats.py", "data/chat_template.py", "data/encoding.py", "data/labels.py"),
    *("data/messages.py", "data/control_tokens.py"),
    *("data/tokenize.py", "data/token_cache.py", "data/report.py", "data/streaming.py"),
)
# Settings that decide how a row is read and tokenized.
SETTINGS_THAT_DECIDE_TOKENS = (
    *("dataset_format", "text_field", "messages_field", "max_length", "apply_truncation", "truncation_mode"),
    *("assistant_only_loss", "completion_only_loss", "escape_control_tokens"),
)


def prepare_source(
    source: Source | SourceHead, vocabulary: Vocabulary, settings: DataSettings
) -> tuple[Path, DataReport]:
    """Return the folder with a source's rows and rejected rows, and its report; tokenize unless the cache has them.

    Raises UserError where no row of such data could be used.
    """
    files = source.identify_files()
    folder = find_folder(build_key(files, vocabulary, settings))
    if not folder.is_dir():
        folder = write_folder(source, vocabulary, settings, folder)
    report = DataReport.from_json(json.loads((folder / REPORT).read_text(encoding="utf-8")))
    report.files = files
    report.unread_fields = Counter({f"{name} of {source.name}": rows for name, rows in report.unread_fields.items()})
    if report.formats:  # an empty shard has none
        report.formats = {source.name: report.formats["rows"]}
        report.loss_on = {source.name: report.loss_on["rows"]}
    return folder, report


def find_folder(key: str) -> Path:
    """Return the folder of a key, held until this process ends; it is not there where the cache has nothing sound."""
    folder = make_private_folder(find_cache_dir() / "data") / key
    hold_folder(folder)
    if folder.is_symlink() or folder.exists():
        if damage := find_damage(folder, key):
            log.warning(f"The tokens kept in {folder} are made anew: the folder {damage}.", every_rank=True)
            remove_path(folder)
        else:
            os.utime(folder)  # the time of its last use
    return folder


def write_folder(source: Source | SourceHead, vocabulary: Vocabulary, settings: DataSettings, folder: Path) -> Path:
    """Tokenize a source into the folder, which is whole once it has its name, and return it."""
    remove_oldest(folder.parent, int(shutil.disk_usage(folder.parent).total * MAX_SHARE_OF_DISK))
    unfinished = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    hold_folder(unfinished)
    try:
        with note_activity("writing tokenized rows", find_cache_dir().parent):
            write_source(source, vocabulary, settings, unfinished)
            seal_folder(unfinished, folder.name)
        publish_folder(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def publish_folder(unfinished: Path, folder: Path) -> None:
    """Give a finished folder its name.

    Where another job or host with the same disk was first, its folder stays: it has the same rows.
    """
    try:
        unfinished.rename(folder)
        sync(folder.parent)
    except OSError:
        if not folder.is_dir():
            raise
        hold_folder(folder)


def write_source(source: Source | SourceHead, vocabulary: Vocabulary, settings: DataSettings, folder: Path) -> None:
    """Write a source's rows, rejected rows and report into a folder.

    Raises UserError where no row of such data could be used.
    """
    report = DataReport()
    chunks = read_undamaged(source, report)
    seen, row_format, first_place = find_format(chunks, settings)
    preparer = None
    if seen:  # a host's shard may be empty
        # Without a row that tells its format every row is bad, and any format finds out why.
        known_format = row_format or "messages"
        encoder = Encoder(vocabulary, settings, known_format)
        report.formats["rows"], report.loss_on["rows"] = known_format, encoder.loss_on
        preparer = Preparer(encoder, settings, known_format, first_place)
    num_processes = settings.dataset_num_proc or len(os.sched_getaffinity(0))
    prepared = prepare_chunks(preparer, itertools.chain(seen, chunks), num_processes)
    write_chunks(prepared, folder / ROWS, folder / REJECTED_ROWS, report)
    write_verbatim(folder / REPORT, json.dumps(vars(report)))


def read_undamaged(source: Source | SourceHead, report: DataReport) -> Iterator[Chunk]:
    """Yield a source's chunks, and note in the report each file that has no rows or cannot be read to its end."""
    for names, chunks in zip(name_parts(source), source.read_parts(CHUNK_ROWS), strict=True):
        is_empty = True
        try:
            for chunk in chunks:
                is_empty = False
                yield chunk
            if is_empty:
                report.empty_files += names
        except DamagedFile as error:
            report.damage.append(str(error))


def name_parts(source: Source | SourceHead) -> list[list[str]]:
    """Return the names of the files in each part of a source; a Hub data set has one part without files."""
    files = source.source if isinstance(source, SourceHead) else source
    names = [name for name, _ in files.name_files()] if isinstance(files, FileSource) else []
    return [[name] for name in names] if source is files and isinstance(files, FileSource) else [names]


def build_key(files: list[dict[str, Any]], vocabulary: Vocabulary, settings: DataSettings) -> str:
    """Return the folder name for these files under these settings, with this version of the code."""
    package = Path(llm_trainer.__file__).parent
    code = [(package / name).read_bytes() for name in CODE_THAT_DECIDES_TOKENS]
    chosen = {name: settings.value(name) for name in SETTINGS_THAT_DECIDE_TOKENS}
    parts = (files, vocabulary.fingerprint, chosen, transformers.__version__, trl.__version__)
    return hashlib.sha256(repr(parts).encode() + b"".join(code)).hexdigest()[:32]


def find_cache_dir() -> Path:
    """Return the folder for all caches of this package, which the launcher chooses."""
    return Path(os.environ["LLM_TRAINER_CACHE"])
