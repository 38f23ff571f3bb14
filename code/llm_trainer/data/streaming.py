# SPDX-License-Identifier: Apache-2.0
"""Streaming of training data larger than the disk: rows are tokenized while training, without a copy.

A reader is a rank, or each of its DataLoader processes. Each reader reads the files in order, pass after pass without
an end. It prepares its own share of the chunks, and shuffles their rows in a buffer. Its rows depend on the seed and
its number alone. A resumed job reads again the rows that were trained on before, and goes on with the very next one.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Features, IterableDataset, List, Value

from llm_trainer.common.errors import UserError
from llm_trainer.common.files import append_rows
from llm_trainer.common.ranks import world_size
from llm_trainer.config.environment import Environment
from llm_trainer.config.sections import DataSettings, TrainingSettings
from llm_trainer.data.encoding import Encoder, Vocabulary
from llm_trainer.data.labels import Ids
from llm_trainer.data.report import REJECTED_ROWS, DataReport
from llm_trainer.data.tokenize import PreparedChunk, Preparer
from llm_trainer.readers.rows import Chunk, DamagedFile
from llm_trainer.readers.sources import FileSource, Source

CHUNK_ROWS = 100
BUFFER_ROWS = 10_000  # rows that a reader holds to shuffle, for all sources together
AUDITED_ROWS = 1_000  # rows of each source that are checked before the first step
FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})

Row = tuple[Ids, Ids]  # input_ids and labels


@dataclass(frozen=True)
class SourceHead:
    """The first rows of a source, which are audited before the first step."""

    source: Source

    @property
    def name(self) -> str:
        """The source's name."""
        return self.source.name

    @property
    def is_sharded(self) -> bool:
        """True where other hosts have other files of the source."""
        return self.source.is_sharded

    def identify_files(self) -> list[dict[str, Any]]:
        """Return name, size in bytes and time of each file, since digests would take a pass over the data."""
        if isinstance(self.source, FileSource):
            stats = [(name, file.stat()) for name, file in self.source.name_files()]
            files = [{"name": name, "bytes": stat.st_size, "modified": stat.st_mtime_ns} for name, stat in stats]
        else:
            files = self.source.identify_files()
        return [{**file, "audited_rows": AUDITED_ROWS} for file in files]

    def read_parts(self, max_rows: int) -> Iterator[Iterator[Chunk]]:
        """Yield one iterator of the chunks that the stream reads first, of at most `max_rows` rows each."""
        chunks = itertools.takewhile(is_audited, read_chunks(self.source, min(CHUNK_ROWS, max_rows)))
        yield (chunk for _, chunk in chunks)


def read_chunks(source: Source, max_rows: int = CHUNK_ROWS) -> Iterator[tuple[int, Chunk]]:
    """Yield a source's chunks in order, each with the number of rows before it."""
    num_rows = 0
    for chunk in itertools.chain.from_iterable(source.read_parts(max_rows)):
        yield num_rows, chunk
        num_rows += len(chunk.rows)


def is_audited(numbered: tuple[int, Chunk]) -> bool:
    """Tell whether a chunk, given with the number of rows before it, is part of the audit."""
    return numbered[0] < AUDITED_ROWS


def build_preparers(vocabulary: Vocabulary, settings: DataSettings, formats: dict[str, str]) -> dict[str, Preparer]:
    """Return each source's preparer by the source's name; `formats` maps the name to the format of its rows."""
    return {
        name: Preparer(Encoder(vocabulary, settings, row_format), settings, row_format, f"the first row of {name!r}")
        for name, row_format in formats.items()
    }


def open_stream(
    sources: list[Source],
    preparers: dict[str, Preparer],
    settings: DataSettings,
    training_settings: TrainingSettings,
    environment: Environment,
) -> IterableDataset:
    """Return the training rows as a dataset without an end.

    Its shards are the readers. Accelerate gives each rank its own, and `datasets` gives each DataLoader process one.
    Raises UserError where a source has no row.
    """
    check_sources(sources, preparers, environment.current_host)
    data_seed = training_settings.data_seed
    num_readers = world_size() * max(1, training_settings.dataloader_num_workers)
    stream = Stream(
        sources=sources,
        preparers=preparers,
        weights=settings.train_weights or {source.name: 1.0 for source in sources},
        max_bad_rows_fraction=settings.max_bad_rows_fraction,
        seed=training_settings.seed if data_seed is None else data_seed,
        num_readers=num_readers,
        num_hosts=len(environment.hosts),
        host=environment.current_host,
        rejected_rows=environment.output_dir / "data" / REJECTED_ROWS,
    )
    return IterableDataset.from_generator(
        stream.generate_rows, features=FEATURES, gen_kwargs={"readers": list(range(num_readers))}
    )


def check_sources(sources: list[Source], preparers: dict[str, Preparer], host: str) -> None:
    """Raise UserError where a source has no row on this host, or no row that tells its format."""
    for source in sources:
        if source.name not in preparers or (isinstance(source, FileSource) and not source.files):
            raise UserError(describe_emptiness(source, host))


@dataclass(frozen=True)
class Stream:
    """The rows of all sources, as each reader gets them."""

    sources: list[Source]
    preparers: dict[str, Preparer]  # source -> its preparer
    weights: dict[str, float]  # source -> its share of the rows, relative to the others
    max_bad_rows_fraction: float
    seed: int
    num_readers: int  # readers of all hosts together, those of the first host first
    num_hosts: int
    host: str  # this host's name, for messages
    rejected_rows: Path

    def generate_rows(self, readers: list[int]) -> Iterator[dict[str, Any]]:
        """Yield rows without an end for the one reader that is given, from sources drawn by their weights."""
        (reader,) = readers
        rows = {source.name: self.repeat_source(source, reader) for source in self.sources}
        generator = self.seed_generator("sources", reader)
        names = list(rows)
        while True:
            (name,) = generator.choices(names, [self.weights[name] for name in names])
            input_ids, labels = next(rows[name])
            yield {"input_ids": input_ids, "labels": labels}

    def repeat_source(self, source: Source, reader: int) -> Iterator[Row]:
        """Yield a source's rows for a reader, pass after pass, each pass in an order of its own.

        Raises UserError where no chunk of the source has a row to train on.
        """
        num_sharing = self.num_readers // self.num_hosts if source.is_sharded else self.num_readers
        buffer_rows = BUFFER_ROWS // len(self.sources)
        num_empty_passes = 0
        for number in itertools.count():
            # A reader has other chunks in each pass. It gets rows even where there are fewer chunks than readers.
            share = (reader + number) % num_sharing
            generator = self.seed_generator(source.name, reader, number)
            rows = shuffle_rows(self.read_pass(source, share, num_sharing, number), buffer_rows, generator)
            first = next(rows, None)
            if first is not None:
                num_empty_passes = 0
                yield first
                yield from rows
                continue
            num_empty_passes += 1
            if num_empty_passes == num_sharing:  # after so many passes the reader has seen every chunk
                raise UserError(describe_emptiness(source, self.host))

    def read_pass(self, source: Source, share: int, num_sharing: int, number: int) -> Iterator[Row]:
        """Yield the rows of every chunk in one share of a pass.

        Raises UserError where a file is damaged or more rows are bad than `max_bad_rows_fraction` allows.
        """
        report = DataReport()
        try:
            for index, (num_rows_before, chunk) in enumerate(read_chunks(source)):
                if index % num_sharing != share:
                    continue
                prepared = self.preparers[source.name].prepare_chunk(chunk)
                if number == 0 and num_rows_before >= AUDITED_ROWS:  # the audit listed the bad rows before
                    self.append_rejected_rows(prepared)
                report.add_report(prepared.report)
                problems = list(report.find_bad_rows("train", self.max_bad_rows_fraction))
                if problems:
                    raise self.build_error(source, *problems)
                yield from copy_rows(prepared)
        except DamagedFile as error:
            raise self.build_error(source, str(error)) from error

    def append_rejected_rows(self, prepared: PreparedChunk) -> None:
        """Append a chunk's bad rows to the job's file of rejected rows."""
        if prepared.rejected:
            append_rows(self.rejected_rows, ({"split": "train", **row} for row in prepared.rejected))

    def build_error(self, source: Source, *problems: str) -> UserError:
        """Return a UserError about a source's rows, which names this host where other hosts have other rows."""
        host = f"Host {self.host}: " if source.is_sharded else ""
        return UserError(*(host + problem for problem in problems))

    def seed_generator(self, *parts: Any) -> random.Random:
        """Return a random generator that is seeded with the job's seed and these parts."""
        return random.Random(repr((self.seed, *parts)))


def copy_rows(prepared: PreparedChunk) -> Iterator[Row]:
    """Yield copies of a chunk's rows: a view in the buffer would keep its whole chunk in memory."""
    columns = [prepared.table.column(name).combine_chunks() for name in ("input_ids", "labels")]
    for input_ids, labels in zip(*columns, strict=True):
        yield input_ids.values.to_numpy().copy(), labels.values.to_numpy().copy()


def shuffle_rows(rows: Iterator[Row], buffer_rows: int, generator: random.Random) -> Iterator[Row]:
    """Yield the rows in random order, as far as a buffer of that many rows lets a row move."""
    buffer = list(itertools.islice(rows, buffer_rows))
    for row in rows:
        index = generator.randrange(buffer_rows)
        yield buffer[index]
        buffer[index] = row
    generator.shuffle(buffer)
    yield from buffer


def describe_emptiness(source: Source, host: str) -> str:
    """Return the sentence for the user about a source without a row to train on, on this host."""
    if source.is_sharded:
        return (
            f"{source.name!r} has no row to train on in the shard of host {host}: with streaming=true each host needs "
            "some, so give it more files than hosts, or use FullyReplicated."
        )
    return f"{source.name!r} has no row to train on: put rows there."
