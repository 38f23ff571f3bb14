# SPDX-License-Identifier: Apache-2.0
"""Training data larger than the disk: read file after file and tokenized while training, without a copy.

Each place (a rank, or each of its DataLoader processes) reads the files in order, pass after pass without an end,
prepares its own share of the chunks, and shuffles the rows in a buffer. What it gives depends on the seed and the place
alone: a resumed job, which reads again what was trained on before, goes on with the very next row.
"""

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from datasets import Features, IterableDataset, List, Value

from llm_trainer.common.errors import UserError
from llm_trainer.common.ranks import world_size
from llm_trainer.config.environment import Environment
from llm_trainer.config.schema import Settings
from llm_trainer.data.encoding import Encoder, Ids, Vocabulary
from llm_trainer.data.report import DataReport
from llm_trainer.data.tokenize import PreparedChunk, Preparer
from llm_trainer.job.job import Job
from llm_trainer.readers.rows import Chunk, DamagedFile
from llm_trainer.readers.sources import FileSource, Source

CHUNK_ROWS = 100
BUFFER_ROWS = 10_000  # of a place, for all sources together
AUDITED_ROWS = 1_000  # of each source, before the first step
FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})

Row = tuple[Ids, Ids]  # input_ids and labels


@dataclass(frozen=True)
class Head:
    """The first rows of a source: what is audited before the first step."""

    source: Source

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def is_sharded(self) -> bool:
        return self.source.is_sharded

    def fingerprint(self) -> list[dict[str, Any]]:
        """Name, size and time of each file: digests would take a pass over the data."""
        if isinstance(self.source, FileSource):
            stats = [(name, file.stat()) for name, file in self.source.named()]
            files = [{"name": name, "bytes": stat.st_size, "modified": stat.st_mtime_ns} for name, stat in stats]
        else:
            files = self.source.fingerprint()
        return [{**file, "audited_rows": AUDITED_ROWS} for file in files]

    def read(self, max_rows: int) -> Iterator[Iterator[Chunk]]:
        """The chunks in which the stream reads them too, of no more rows than max_rows."""
        chunks = itertools.takewhile(is_audited, read_chunks(self.source, min(CHUNK_ROWS, max_rows)))
        yield (chunk for _, chunk in chunks)


def read_chunks(source: Source, max_rows: int = CHUNK_ROWS) -> Iterator[tuple[int, Chunk]]:
    """A source's chunks in order, each with the number of rows before it."""
    num_rows = 0
    for chunk in itertools.chain.from_iterable(source.read(max_rows)):
        yield num_rows, chunk
        num_rows += len(chunk.rows)


def is_audited(numbered: tuple[int, Chunk]) -> bool:
    return numbered[0] < AUDITED_ROWS


def open_stream(job: Job, vocabulary: Vocabulary, formats: dict[str, str]) -> IterableDataset:
    """The training rows without an end; `formats` are those of each source's rows.

    Its shards are the places, of which Accelerate gives each rank its own, and `datasets` each DataLoader process.
    """
    settings = job.settings
    for source in job.inputs.train:
        if source.name not in formats or (isinstance(source, FileSource) and not source.files):
            raise UserError(describe_emptiness(source, job.environment))
    encoders = {name: Encoder(vocabulary, settings, row_format) for name, row_format in formats.items()}
    preparers = {
        name: Preparer(encoders[name], settings, row_format, f"the first row of {name!r}")
        for name, row_format in formats.items()
    }
    num_places = world_size() * max(1, settings.training.dataloader_num_workers)
    stream = Stream(job.inputs.train, preparers, settings, job.environment, num_places)
    return IterableDataset.from_generator(
        stream.generate, features=FEATURES, gen_kwargs={"places": list(range(num_places))}
    )


@dataclass(frozen=True)
class Stream:
    """The rows of all sources as each place gets them."""

    sources: list[Source]
    preparers: dict[str, Preparer]  # of each source
    settings: Settings
    environment: Environment
    num_places: int  # of all hosts together, the first host's first

    def generate(self, places: list[int]) -> Iterator[dict[str, Any]]:
        (place,) = places
        weights = self.settings.data.train_weights or {source.name: 1.0 for source in self.sources}
        rows = {source.name: self.repeat(source, place) for source in self.sources}
        chance = self.seed_random("sources", place)
        names = list(rows)
        while True:
            (name,) = chance.choices(names, [weights[name] for name in names])
            input_ids, labels = next(rows[name])
            yield {"input_ids": input_ids, "labels": labels}

    def repeat(self, source: Source, place: int) -> Iterator[Row]:
        """A source's rows for this place, pass after pass, each pass in an order of its own."""
        num_sharing = self.num_places // len(self.environment.hosts) if source.is_sharded else self.num_places
        num_empty_passes = 0
        for number in itertools.count():
            # A place has other chunks in each pass, so that it has some even where there are fewer than places.
            own = (place + number) % num_sharing
            chance = self.seed_random(source.name, place, number)
            rows = shuffle(self.read_pass(source, own, num_sharing, number), BUFFER_ROWS // len(self.sources), chance)
            first = next(rows, None)
            if first is not None:
                num_empty_passes = 0
                yield first
                yield from rows
                continue
            num_empty_passes += 1
            if num_empty_passes == num_sharing:  # all chunks were this place's own
                raise UserError(describe_emptiness(source, self.environment))

    def read_pass(self, source: Source, own: int, num_sharing: int, number: int) -> Iterator[Row]:
        """The rows of every chunk that is this place's own. Raises UserError where too many are bad."""
        report = DataReport()
        try:
            for index, (num_rows_before, chunk) in enumerate(read_chunks(source)):
                if index % num_sharing != own:
                    continue
                prepared = self.preparers[source.name].prepare(chunk)
                if number == 0 and num_rows_before >= AUDITED_ROWS:  # the audit listed those before
                    self.keep_rejected(prepared)
                report.add(prepared.report)
                problems = list(report.find_bad_rows("train", self.settings.data.max_bad_rows_fraction))
                if problems:
                    raise self.mistake(source, *problems)
                yield from split_rows(prepared)
        except DamagedFile as error:
            raise self.mistake(source, str(error)) from error

    def keep_rejected(self, prepared: PreparedChunk) -> None:
        if prepared.rejected:
            lines = [json.dumps({"split": "train", **row}, ensure_ascii=False) + "\n" for row in prepared.rejected]
            file_of_all = self.environment.output_dir / "data" / "rejected_rows.jsonl"
            file_of_all.parent.mkdir(parents=True, exist_ok=True)
            with file_of_all.open("a", encoding="utf-8") as file:
                file.write("".join(lines))  # at once: other ranks of this host write to it too

    def mistake(self, source: Source, *problems: str) -> UserError:
        """With the host's name where others do not have the rows that are meant."""
        host = f"Host {self.environment.current_host}: " if source.is_sharded else ""
        return UserError(*(host + problem for problem in problems))

    def seed_random(self, *parts: Any) -> random.Random:
        seed = (
            self.settings.training.seed
            if self.settings.training.data_seed is None
            else self.settings.training.data_seed
        )
        return random.Random(repr((seed, *parts)))


def split_rows(prepared: PreparedChunk) -> Iterator[Row]:
    """Copies of the rows: a view in the buffer would keep its whole chunk in memory."""
    columns = [prepared.table.column(name).combine_chunks() for name in ("input_ids", "labels")]
    for input_ids, labels in zip(*columns, strict=True):
        yield input_ids.values.to_numpy().copy(), labels.values.to_numpy().copy()


def shuffle(rows: Iterator[Row], size: int, chance: random.Random) -> Iterator[Row]:
    """The rows in an order by chance, as far as a buffer of that size lets a row move."""
    buffer = list(itertools.islice(rows, size))
    for row in rows:
        place = chance.randrange(size)
        yield buffer[place]
        buffer[place] = row
    chance.shuffle(buffer)
    yield from buffer


def describe_emptiness(source: Source, environment: Environment) -> str:
    if source.is_sharded:
        return (
            f"{source.name!r} has no row to train on in the shard of host {environment.current_host}: with "
            "streaming=true each host needs some, so give it more files than hosts, or use FullyReplicated."
        )
    return f"{source.name!r} has no row to train on: put rows there."
