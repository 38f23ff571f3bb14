# SPDX-License-Identifier: Apache-2.0
"""A source's tokens on disk: made now, or by an earlier job with the same files, model and settings."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
import trl

import llm_trainer
from llm_trainer.config.schema import Settings
from llm_trainer.data.encoding import Encoder, Vocabulary
from llm_trainer.data.report import DataReport
from llm_trainer.data.streaming import Head
from llm_trainer.data.tokenize import CHUNK_ROWS, prepare
from llm_trainer.readers.rows import Chunk, DamagedFile
from llm_trainer.readers.sources import Source

ROWS, REJECTED, REPORT = "rows.arrow", "rejected_rows.jsonl", "report.json"
# The files of this package that decide what tokens a row becomes. A test compares them with what they import.
CODE_THAT_DECIDES_TOKENS = (
    *("readers/rows.py", "readers/json.py", "readers/tables.py", "readers/files.py", "readers/discovery.py"),
    *("readers/sources.py", "data/formats.py", "data/chat_template.py", "data/encoding.py", "data/tokenize.py"),
    *("data/token_cache.py", "data/report.py", "data/streaming.py"),
)
# What decides how a row is read and tokenized.
SETTINGS = (
    *("dataset_format", "text_field", "messages_field", "max_length", "apply_truncation", "truncation_mode"),
    *("assistant_only_loss", "completion_only_loss"),
)


def prepare_source(source: Source | Head, vocabulary: Vocabulary, settings: Settings) -> tuple[Path, DataReport]:
    """The folder with a source's rows and its rejected ones, and its report: made now, or by an earlier job."""
    files = source.fingerprint()
    folder = cache_dir() / "data" / build_key(files, vocabulary, settings)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
        try:
            write_source(source, vocabulary, settings, unfinished)
            put_in_place(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    report = DataReport.from_json(json.loads((folder / REPORT).read_text(encoding="utf-8")))
    report.files = files
    if report.formats:  # an empty shard has none
        report.formats = {source.name: report.formats["rows"]}
        report.loss_on = {source.name: report.loss_on["rows"]}
    return folder, report


def put_in_place(unfinished: Path, folder: Path) -> None:
    """Give a whole folder its name, unless another job or host with the same disk was first: it has the same rows."""
    try:
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def write_source(source: Source | Head, vocabulary: Vocabulary, settings: Settings, folder: Path) -> None:
    """Prepare a source's rows into the folder. Raises UserError where no row of such data could be used."""
    report = DataReport()

    def read() -> Iterator[Chunk]:
        for chunks in source.read(CHUNK_ROWS):
            try:
                yield from chunks
            except DamagedFile as error:
                report.damage.append(str(error))

    def build_encoder(row_format: str) -> Encoder:
        encoder = Encoder(vocabulary, settings, row_format)
        report.formats["rows"], report.loss_on["rows"] = row_format, encoder.loss_on
        return encoder

    num_processes = settings.data.dataset_num_proc or len(os.sched_getaffinity(0))
    prepare(read(), settings, build_encoder, folder / ROWS, folder / REJECTED, num_processes, report)
    (folder / REPORT).write_text(json.dumps(vars(report)), encoding="utf-8")


def build_key(files: list[dict[str, Any]], vocabulary: Vocabulary, settings: Settings) -> str:
    """A name for what these files become under these settings, with this version of our code."""
    package = Path(llm_trainer.__file__).parent
    code = [(package / name).read_bytes() for name in CODE_THAT_DECIDES_TOKENS]
    chosen = {name: settings.value(name) for name in SETTINGS}
    parts = (files, vocabulary.fingerprint, chosen, transformers.__version__, trl.__version__)
    return hashlib.sha256(repr(parts).encode() + b"".join(code)).hexdigest()[:32]


def cache_dir() -> Path:
    return Path(os.environ["LLM_TRAINER_CACHE"])
