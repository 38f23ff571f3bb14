# SPDX-License-Identifier: Apache-2.0
"""The job's data: prepared once a host, kept for the next job with the same, memory-mapped by every rank."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import transformers
import trl
from datasets import Dataset, concatenate_datasets

from llm_trainer.containers import Chunk, DamagedFile
from llm_trainer.data_report import DataReport
from llm_trainer.distributed import once_per_host
from llm_trainer.encoding import Encoder, Vocabulary
from llm_trainer.errors import UserError
from llm_trainer.launch import Job
from llm_trainer.preparation import CHUNK_ROWS, prepare
from llm_trainer.settings import Settings
from llm_trainer.sources import Source

ROWS, REJECTED, REPORT = "rows.arrow", "rejected_rows.jsonl", "report.json"
# What decides how a row is read and tokenized.
SETTINGS = (
    *("dataset_format", "text_field", "messages_field", "max_length", "apply_truncation", "truncation_mode"),
    *("assistant_only_loss", "completion_only_loss"),
)


@dataclass(frozen=True)
class Data:
    """What a job trains on and is measured with: `input_ids`, `labels` and `length` of each row."""

    splits: dict[str, Dataset]  # train, and validation if there is one
    reports: dict[str, DataReport]  # of each split


def load_data(job: Job, vocabulary: Vocabulary, scratch_dir: Path) -> Data:
    """The job's data. Raises UserError with everything that is wrong with any of them."""
    settings, output_dir = job.settings, job.environment.output_dir
    splits = {"train": job.inputs.train}
    if job.inputs.validation:
        splits["validation"] = job.inputs.validation
    index = scratch_dir / "data.json"

    def work() -> None:
        index.write_text(json.dumps(prepare_splits(splits, vocabulary, settings, output_dir)), encoding="utf-8")

    once_per_host(scratch_dir / "data.done", work)
    prepared = json.loads(index.read_text(encoding="utf-8"))
    reports = {name: DataReport.from_json(split["report"]) for name, split in prepared.items()}
    datasets = {name: open_split(split["files"], splits[name]) for name, split in prepared.items()}
    rows = {name: concatenate_datasets(list(own.values())) for name, own in datasets.items()}
    if settings.train_weights:
        rows["train"] = rows["train"].select(choose_rows(datasets["train"], settings.train_weights, settings.seed))
    if settings.shuffle_dataset:
        rows["train"] = rows["train"].shuffle(seed=settings.seed, keep_in_memory=True)
    return Data(rows, reports)


def open_split(files: list[str], sources: list[Source]) -> dict[str, Dataset]:
    """Source -> its rows, memory-mapped."""
    columns = ["input_ids", "labels", "length"]
    return {
        source.name: Dataset.from_file(file).select_columns(columns)
        for file, source in zip(files, sources, strict=True)
    }


def choose_rows(datasets: dict[str, Dataset], weights: dict[str, float], seed: int) -> Any:
    """The places of an epoch's rows: each source has its share of them, and none of its rows is left out.

    A source whose weight is large for its size repeats: whole times, and a random part.
    """
    per_row = {name: weights[name] / len(rows) for name, rows in datasets.items()}
    random = np.random.default_rng(seed)
    places, first = [], 0
    for name, rows in datasets.items():
        num_wanted = round(len(rows) * per_row[name] / min(per_row.values()))
        whole, part = divmod(num_wanted, len(rows))
        own = np.arange(first, first + len(rows))
        places += [np.tile(own, whole), np.sort(random.permutation(own)[:part])]
        first += len(rows)
    return np.concatenate(places)


def prepare_splits(
    splits: dict[str, list[Source]], vocabulary: Vocabulary, settings: Settings, output_dir: Path
) -> dict[str, Any]:
    """Each split's Arrow files and report, after the audit of all of them. Raises UserError with every problem."""
    problems: list[str] = []
    reports: dict[str, DataReport] = {}
    folders: dict[str, list[Path]] = {}
    rejected_rows = output_dir / "data" / "rejected_rows.jsonl"
    rejected_rows.unlink(missing_ok=True)  # of an earlier job in the same tree
    for name, sources in splits.items():
        reports[name], folders[name] = DataReport(), []
        for source in sources:
            try:
                folder, report = prepare_source(source, vocabulary, settings)
            except UserError as error:
                problems += error.problems
                continue
            reports[name].add(report)
            folders[name].append(folder)
            keep_rejected(folder / REJECTED, rejected_rows, name)
    for name, report in reports.items():
        problems += report.find_bad_rows(name, settings.max_bad_rows_fraction)
    if not problems:
        for name, report in reports.items():
            problems += report.find_flaws(name)
    if problems:
        raise UserError(*problems)
    count_duplicates(reports, folders)
    return {
        name: {"files": [str(folder / ROWS) for folder in folders[name]], "report": vars(report)}
        for name, report in reports.items()
    }


def keep_rejected(own: Path, target: Path, split: str) -> None:
    """Add a source's bad rows to those of the job."""
    if not own.stat().st_size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with own.open(encoding="utf-8") as rows, target.open("a", encoding="utf-8") as file:
        for line in rows:
            file.write(json.dumps({"split": split, **json.loads(line)}, ensure_ascii=False) + "\n")


def count_duplicates(reports: dict[str, DataReport], folders: dict[str, list[Path]]) -> None:
    """Count rows that are there twice, and training rows that are in the validation data too."""
    digests = {name: np.concatenate([read_digests(folder) for folder in own]) for name, own in folders.items()}
    for name, own in digests.items():
        reports[name].num_duplicate_rows = len(own) - len(np.unique(own))
    if "validation" in digests:
        reports["train"].num_rows_in_validation = int(np.isin(digests["train"], digests["validation"]).sum())


def read_digests(folder: Path) -> Any:
    return Dataset.from_file(str(folder / ROWS)).data.column("digest").to_numpy()


def prepare_source(source: Source, vocabulary: Vocabulary, settings: Settings) -> tuple[Path, DataReport]:
    """The folder with a source's rows and its rejected ones, and its report: made now, or by an earlier job."""
    files = source.fingerprint()
    folder = cache_dir() / "data" / build_key(files, vocabulary, settings)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
        try:
            write_source(source, vocabulary, settings, unfinished)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    report = DataReport.from_json(json.loads((folder / REPORT).read_text(encoding="utf-8")))
    report.files = files
    report.formats = {source.name: report.formats["rows"]}
    report.loss_on = {source.name: report.loss_on["rows"]}
    return folder, report


def write_source(source: Source, vocabulary: Vocabulary, settings: Settings, folder: Path) -> None:
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

    num_processes = settings.dataset_num_proc or len(os.sched_getaffinity(0))
    prepare(read(), settings, build_encoder, folder / ROWS, folder / REJECTED, num_processes, report)
    (folder / REPORT).write_text(json.dumps(vars(report)), encoding="utf-8")


def build_key(files: list[dict[str, Any]], vocabulary: Vocabulary, settings: Settings) -> str:
    """A name for what these files become under these settings, with this version of our code."""
    code = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
    chosen = {name: getattr(settings, name) for name in SETTINGS}
    parts = (files, vocabulary.fingerprint(), chosen, transformers.__version__, trl.__version__)
    return hashlib.sha256(repr(parts).encode() + b"".join(code)).hexdigest()[:32]


def cache_dir() -> Path:
    return Path(os.environ["LLM_TRAINER_CACHE"])
