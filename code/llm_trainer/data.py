# SPDX-License-Identifier: Apache-2.0
"""The job's data: prepared once a host, kept for the next job with the same, memory-mapped by every rank."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import transformers
import trl
from datasets import Dataset, IterableDataset, concatenate_datasets

from llm_trainer.containers import Chunk, DamagedFile
from llm_trainer.data_report import DataReport
from llm_trainer.distributed import local_rank, once_per_host
from llm_trainer.encoding import Encoder, Vocabulary
from llm_trainer.errors import UserError
from llm_trainer.exchange import Leaders
from llm_trainer.launch import Job
from llm_trainer.preparation import CHUNK_ROWS, prepare
from llm_trainer.settings import Settings
from llm_trainer.sources import Source
from llm_trainer.streaming import Head, open_stream

Files = dict[str, dict[str, list[Path]]]  # split -> source -> its Arrow files, in the order of the hosts

ROWS, REJECTED, REPORT = "rows.arrow", "rejected_rows.jsonl", "report.json"
# What decides how a row is read and tokenized.
SETTINGS = (
    *("dataset_format", "text_field", "messages_field", "max_length", "apply_truncation", "truncation_mode"),
    *("assistant_only_loss", "completion_only_loss"),
)


@dataclass(frozen=True)
class Data:
    """What a job trains on and is measured with: `input_ids`, `labels` and `length` of each row."""

    train: Dataset | IterableDataset
    sample: Dataset  # training rows to look at: all, or the audited ones of a stream
    validation: Dataset | None
    reports: dict[str, DataReport]  # of train, and of validation if there is one


def load_data(job: Job, vocabulary: Vocabulary, scratch_dir: Path) -> Data:
    """The job's data. Raises UserError with everything that is wrong with any of them."""
    settings, output_dir = job.settings, job.environment.output_dir
    splits: dict[str, Sequence[Source | Head]] = {"train": job.inputs.train}
    if settings.streaming:
        splits["train"] = [Head(source) for source in job.inputs.train]
    if job.inputs.validation:
        splits["validation"] = job.inputs.validation
    index, done = scratch_dir / "data.json", scratch_dir / "data.done"
    leaders = None
    if any(source.is_sharded for sources in splits.values() for source in sources):
        if local_rank() == 0:
            done.unlink(missing_ok=True)  # after a restart in place, all hosts exchange again or none
        leaders = Leaders(job.environment.hosts)  # which waits for all ranks

    def work() -> None:
        prepared = prepare_splits(splits, vocabulary, settings, output_dir, leaders, scratch_dir / "shards")
        index.write_text(json.dumps(prepared), encoding="utf-8")

    once_per_host(done, work)
    prepared = json.loads(index.read_text(encoding="utf-8"))
    reports = {name: DataReport.from_json(split["report"]) for name, split in prepared.items()}
    datasets = {name: open_split(split["files"]) for name, split in prepared.items()}
    if settings.streaming:
        sample = concatenate_datasets(list(datasets["train"].values()))
        train = open_stream(job, vocabulary, reports["train"].formats)
    else:
        train = sample = mix(datasets["train"], settings)
    validation = concatenate_datasets(list(datasets["validation"].values())) if "validation" in datasets else None
    return Data(train, sample, validation, reports)


def open_split(files: dict[str, list[str]]) -> dict[str, Dataset]:
    """Source -> its rows, memory-mapped."""
    columns = ["input_ids", "labels", "length"]
    return {
        name: concatenate_datasets([Dataset.from_file(file).select_columns(columns) for file in own])
        for name, own in files.items()
    }


def mix(datasets: dict[str, Dataset], settings: Settings) -> Dataset:
    """The rows of all sources: each once, or as often as gives every source its share without leaving a row out."""
    everything = concatenate_datasets(list(datasets.values()))
    if not settings.train_weights or len(datasets) == 1:
        return everything
    per_row = {name: settings.train_weights[name] / len(rows) for name, rows in datasets.items()}
    random = np.random.default_rng(settings.seed)
    indices, first = [], 0
    for name, rows in datasets.items():
        num_wanted = round(len(rows) * per_row[name] / min(per_row.values()))
        whole, part = divmod(num_wanted, len(rows))
        own = np.arange(first, first + len(rows))
        indices += [np.tile(own, whole), np.sort(random.permutation(own)[:part])]
        first += len(rows)
    return everything.select(np.concatenate(indices))


def prepare_splits(
    splits: Mapping[str, Sequence[Source | Head]],
    vocabulary: Vocabulary,
    settings: Settings,
    output_dir: Path,
    leaders: Leaders | None,
    shards_dir: Path,
) -> dict[str, Any]:
    """Each split's Arrow files and report, after the audit of all of them. Raises UserError with every problem.

    With `leaders` some sources are sharded: those of all hosts are audited, and come to `shards_dir`.
    """
    files, parts, problems = prepare_sources(splits, vocabulary, settings, output_dir)
    sharded = [(name, source.name) for name, sources in splits.items() for source in sources if source.is_sharded]
    if leaders:
        for name, source_name in sharded:
            parts[name][source_name] = leaders.merge_reports(source_name, parts[name].get(source_name), problems)
        problems = leaders.merge_problems(problems)
    reports = {name: add_up(own.values()) for name, own in parts.items()}
    for name, report in reports.items():
        problems += report.find_bad_rows(name, settings.max_bad_rows_fraction)
    if not problems:
        for name, report in reports.items():
            problems += report.find_flaws(name)
    if problems:
        raise UserError(*problems)
    if leaders:
        for number, (name, source_name) in enumerate(sharded):
            (own_file,) = files[name][source_name]
            files[name][source_name] = leaders.exchange_file(own_file, shards_dir / str(number))
    count_duplicates(reports, files)
    return {
        name: {"files": {source: list(map(str, own)) for source, own in files[name].items()}, "report": vars(report)}
        for name, report in reports.items()
    }


def prepare_sources(
    splits: Mapping[str, Sequence[Source | Head]], vocabulary: Vocabulary, settings: Settings, output_dir: Path
) -> tuple[Files, dict[str, dict[str, DataReport]], list[str]]:
    """What this host has of each source of each split: its Arrow file, its report; and every problem with them."""
    files: Files = {name: {} for name in splits}
    reports: dict[str, dict[str, DataReport]] = {name: {} for name in splits}
    problems: list[str] = []
    rejected_rows = output_dir / "data" / "rejected_rows.jsonl"
    rejected_rows.unlink(missing_ok=True)  # of an earlier job in the same tree
    for name, sources in splits.items():
        for source in sources:
            try:
                folder, reports[name][source.name] = prepare_source(source, vocabulary, settings)
            except UserError as error:
                problems += error.problems
                continue
            files[name][source.name] = [folder / ROWS]
            keep_rejected(folder / REJECTED, rejected_rows, name)
    return files, reports, problems


def add_up(parts: Iterable[DataReport]) -> DataReport:
    total = DataReport()
    for part in parts:
        total.add(part)
    return total


def keep_rejected(own: Path, target: Path, split: str) -> None:
    """Add a source's bad rows to those of the job."""
    if not own.stat().st_size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with own.open(encoding="utf-8") as rows, target.open("a", encoding="utf-8") as file:
        for line in rows:
            file.write(json.dumps({"split": split, **json.loads(line)}, ensure_ascii=False) + "\n")


def count_duplicates(reports: dict[str, DataReport], files: Files) -> None:
    """Count rows that are there twice, and training rows that are in the validation data too."""
    digests = {
        name: np.concatenate([read_digests(file) for shards in own.values() for file in shards])
        for name, own in files.items()
    }
    for name, own in digests.items():
        reports[name].num_duplicate_rows = len(own) - len(np.unique(own))
    if "validation" in digests:
        reports["train"].num_rows_in_validation = int(np.isin(digests["train"], digests["validation"]).sum())


def read_digests(file: Path) -> Any:
    return Dataset.from_file(str(file)).data.column("digest").to_numpy()


def prepare_source(source: Source | Head, vocabulary: Vocabulary, settings: Settings) -> tuple[Path, DataReport]:
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
    if report.formats:  # an empty shard has none
        report.formats = {source.name: report.formats["rows"]}
        report.loss_on = {source.name: report.loss_on["rows"]}
    return folder, report


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
