# SPDX-License-Identifier: Apache-2.0
"""Cache on disk of each source's tokens: made now, or by an earlier job with the same files, model and settings."""

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import transformers
import trl

import llm_trainer
from llm_trainer.common.files import write_verbatim
from llm_trainer.config.sections import METHOD_FORMATS, DataSettings
from llm_trainer.data.encoding import Encoder, Vocabulary
from llm_trainer.data.report import REJECTED_ROWS, DataReport
from llm_trainer.data.streaming import SourceHead
from llm_trainer.data.tokenize import (
    CHUNK_ROWS,
    CHUNK_ROWS_WITH_BYTES,
    HUB_IMAGES,
    Preparer,
    choose_features,
    find_format,
    prepare_chunks,
    write_chunks,
)
from llm_trainer.host.kept_folders import find_folder, write_folder
from llm_trainer.readers.images import ImageFolder
from llm_trainer.readers.rows import Chunk, DamagedFile
from llm_trainer.readers.sources import FileSource, Source
from llm_trainer.readers.tar_shards import IMAGE_SUFFIXES

ROWS, REPORT = "rows.arrow", "report.json"
# Files of this package that decide what tokens a row becomes. A test compares them with what the cache imports.
CODE_THAT_DECIDES_TOKENS = (
    *("readers/rows.py", "readers/json.py", "readers/tables.py", "readers/files.py", "readers/discovery.py"),
    *("readers/sources.py", "readers/images.py", "readers/addresses.py", "readers/tar_shards.py"),
    *("data/chat_template.py", "data/encoding.py", "data/labels.py", "data/fitting.py"),
    *("data/formats/detection.py", "data/formats/examples.py", "data/formats/imitation.py"),
    *("data/formats/pictures.py", "data/formats/preferences.py", "data/formats/prompts.py", "data/formats/turns.py"),
    *("data/formats/unpaired.py", "data/formats/values.py"),
    *("data/images/processing.py", "data/images/processors.py", "data/messages.py", "data/control_tokens.py"),
    *("data/tokenize.py", "data/token_cache.py", "data/report.py", "data/streaming.py"),
)
# Settings that decide how a row is read and tokenized.
SETTINGS_THAT_DECIDE_TOKENS = (
    *("method", "dataset_format", "text_field", "messages_field", "max_length", "apply_truncation", "truncation_mode"),
    *("max_image_pixels", "max_images_per_row", "allow_remote_images"),
    *("assistant_only_loss", "completion_only_loss", "escape_control_tokens"),
)


def prepare_source(
    source: Source | SourceHead, vocabulary: Vocabulary, settings: DataSettings
) -> tuple[Path, DataReport]:
    """Return the folder with a source's rows and rejected rows, and its report; tokenize unless the cache has them.

    Raises UserError where no row of such data could be used.
    """
    files = source.identify_files()
    beside = list_images(source) if vocabulary.images is not None else []
    folder = find_folder("data", build_key([*files, *beside], vocabulary, settings), "The tokens")
    if not folder.is_dir():
        write = partial(write_source, source, vocabulary, settings)
        folder = write_folder(folder, write, "writing tokenized rows")
    report = DataReport.from_json(json.loads((folder / REPORT).read_text(encoding="utf-8")))
    report.files = files
    report.unread_fields = Counter({f"{name} of {source.name}": rows for name, rows in report.unread_fields.items()})
    if report.formats:  # an empty shard has none
        report.formats = {source.name: report.formats["rows"]}
        report.loss_on = {source.name: report.loss_on["rows"]}
    return folder, report


def write_source(source: Source | SourceHead, vocabulary: Vocabulary, settings: DataSettings, folder: Path) -> None:
    """Write a source's rows, rejected rows and report into a folder.

    Raises UserError where no row of such data could be used.
    """
    report = DataReport(sequences_a_row=settings.sequences_a_row)
    chunks = read_undamaged(source, report, count_chunk_rows(source, vocabulary, settings))
    seen, row_format, first_place = find_format(chunks, settings)
    preparer = None
    if seen:  # a host's shard may be empty
        # Without a row that tells its format every row is bad, and any format finds out why.
        known_format = row_format or ("messages" if settings.method == "sft" else METHOD_FORMATS[settings.method][0])
        encoder = Encoder(vocabulary, settings, known_format)
        report.formats["rows"], report.loss_on["rows"] = known_format, encoder.loss_on
        preparer = Preparer(encoder, settings, known_format, first_place, find_image_folder(source))
    num_processes = settings.dataset_num_proc or len(os.sched_getaffinity(0))
    prepared = prepare_chunks(preparer, itertools.chain(seen, chunks), num_processes)
    write_chunks(prepared, choose_features(settings, vocabulary), folder / ROWS, folder / REJECTED_ROWS, report)
    write_verbatim(folder / REPORT, json.dumps(vars(report)))


def find_image_folder(source: Source | SourceHead) -> ImageFolder:
    """Return the folder that a source's images may not leave."""
    files = source.source if isinstance(source, SourceHead) else source
    return ImageFolder(files.folder, files.is_sharded) if isinstance(files, FileSource) else HUB_IMAGES


def list_images(source: Source | SourceHead) -> list[dict[str, Any]]:
    """Return path, size in bytes and time of the files beside a source's rows that may be its images.

    Rows hold the paths of their images, and the tokens of an image depend on its size.
    """
    files = source.source if isinstance(source, SourceHead) else source
    if not isinstance(files, FileSource):
        return []
    images = [file for file in files.passed_over if file.suffix.lower()[1:] in IMAGE_SUFFIXES]
    stats = [(str(file), file.stat()) for file in sorted(images) if file.is_file()]
    found = [{"image": path, "bytes": stat.st_size, "modified": stat.st_mtime_ns} for path, stat in stats]
    return [{"folder": str(files.folder.resolve())}, *found]


def count_chunk_rows(source: Source | SourceHead, vocabulary: Vocabulary, settings: DataSettings) -> int:
    """Return the most rows of a chunk: few where they get the encoded bytes of images, which memory holds for each."""
    gets_bytes = vocabulary.images is not None and (source.is_sharded or settings.allow_remote_images)
    return CHUNK_ROWS_WITH_BYTES if gets_bytes else CHUNK_ROWS


def read_undamaged(source: Source | SourceHead, report: DataReport, max_rows: int) -> Iterator[Chunk]:
    """Yield a source's chunks of at most `max_rows` rows.

    The report notes each file that has no rows or cannot be read to its end.
    """
    for names, chunks in zip(name_parts(source), source.read_parts(max_rows), strict=True):
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
