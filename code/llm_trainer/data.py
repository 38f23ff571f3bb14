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
from llm_trainer.preflight import Inputs
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
    settings, inputs, index = job.settings, job.inputs, scratch_dir / "data.json"
    rejected_rows = job.environment.output_dir / "data" / REJECTED

    def work() -> None:
        prepared, problems = prepare_splits(inputs, vocabulary, settings, rejected_rows)
        if problems:
            raise UserError(*problems)
        values = {name: {"files": split.files, "report": vars(split.report)} for name, split in prepared.items()}
        index.write_text(json.dumps(values), encoding="utf-8")

    once_per_host(scratch_dir / "data.done", work)
    prepared = json.loads(index.read_text(encoding="utf-8"))
    reports = {name: DataReport.from_json(split["report"]) for name, split in prepared.items()}
    sources = {"train": inputs.train, "validation": inputs.validation}
    datasets = {name: open_split(split["files"], sources[name]) for name, split in prepared.items()}
    rows = {name: concatenate_datasets(list(own.values())) for name, own in datasets.items()}
    if settings.train_weights:
        rows["train"] = rows["train"].select(choose_rows(datasets["train"], settings.train_weights, settings.seed))
    if settings.shuffle_dataset:
        rows["train"] = rows["train"].shuffle(seed=settings.seed, keep_in_memory=True)
    return Data(rows, reports)


@dataclass
class Split:
    """What became of one split's sources."""

    report: DataReport
    files: list[str]  # of Arrow, one a source that could be prepared


def open_split(files: list[str], sources: list[Source]) -> dict[str, Dataset]:
    """Source -> its rows, memory-mapped."""
    columns = ["input_ids", "labels", "length"]
    return {
        source.name: Dataset.from_file(file).select_columns(columns)
        for file, source in zip(files, sources, strict=True)
    }


def first_row(split: Split) -> dict[str, list[int]] | None:
    """The split's first row, if it has one."""
    datasets = (Dataset.from_file(file) for file in split.files)
    return next((rows[0] for rows in datasets if len(rows)), None)


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
    inputs: Inputs, vocabulary: Vocabulary, settings: Settings, rejected_rows: Path
) -> tuple[dict[str, Split], list[str]]:
    """Each split that the job has, prepared, and a sentence for everything that is wrong with any of them."""
    splits: dict[str, Split] = {}
    problems: list[str] = []
    rejected_rows.unlink(missing_ok=True)  # of an earlier job in the same tree
    for name, sources in (("train", inputs.train), ("validation", inputs.validation)):
        if sources:
            splits[name], own = prepare_split(name, sources, vocabulary, settings, rejected_rows)
            problems += own
    count_duplicates(splits)
    return splits, problems


def prepare_split(
    name: str, sources: list[Source], vocabulary: Vocabulary, settings: Settings, rejected_rows: Path
) -> tuple[Split, list[str]]:
    split = Split(DataReport(), [])
    problems: list[str] = []
    for source in sources:
        try:
            folder, report = prepare_source(source, vocabulary, settings)
        except UserError as error:
            problems += error.problems
            continue
        split.report.add(report)
        split.files.append(str(folder / ROWS))
        keep_rejected(folder / REJECTED, rejected_rows, name)
    problems += split.report.find_bad_rows(name, settings.max_bad_rows_fraction)
    # Where rows are missing, the others' flaws may only come from that.
    return split, problems or list(split.report.find_flaws(name))


def keep_rejected(own: Path, target: Path, split: str) -> None:
    """Add a source's bad rows to those of the job."""
    if not own.stat().st_size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with own.open(encoding="utf-8") as rows, target.open("a", encoding="utf-8") as file:
        for line in rows:
            file.write(json.dumps({"split": split, **json.loads(line)}, ensure_ascii=False) + "\n")


def count_duplicates(splits: dict[str, Split]) -> None:
    """Count rows that are there twice, and training rows that are in the validation data too."""
    digests = {name: read_digests(split.files) for name, split in splits.items()}
    for name, own in digests.items():
        splits[name].report.num_duplicate_rows = len(own) - len(np.unique(own))
    if digests.keys() >= {"train", "validation"}:
        num_shared = int(np.isin(digests["train"], digests["validation"]).sum())
        splits["train"].report.num_rows_in_validation = num_shared


def read_digests(files: list[str]) -> Any:
    columns = [Dataset.from_file(file).data.column("digest").to_numpy() for file in files]
    return np.concatenate([np.zeros(0, dtype=np.uint64), *columns])


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
