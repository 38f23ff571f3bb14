# SPDX-License-Identifier: Apache-2.0
"""Tokenizing of one source's rows into an Arrow file, on all cores, in the order of the rows.

This process reads the files and writes the result. Others parse, render and tokenize the chunks in between.
"""

import gc
import itertools
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from datasets import Features, List, Value
from datasets.arrow_writer import ArrowWriter

from llm_trainer.common.errors import UserError
from llm_trainer.common.files import append_rows
from llm_trainer.common.processes import bind_to_parent
from llm_trainer.common.redaction import hide_known, hide_queries
from llm_trainer.config.sections import IMAGE_METHODS, DataSettings
from llm_trainer.data.encoding import Encoder, Vocabulary
from llm_trainer.data.fitting import Fitter, Sequences
from llm_trainer.data.formats.detection import (
    OtherMethodError,
    UntakenImagesError,
    detect_format,
    has_placeholder,
    list_read_fields,
    list_sides,
    parse_example,
)
from llm_trainer.data.formats.examples import Conversation, Example, Fields, Pair, Prompt, RowError, Text
from llm_trainer.data.formats.pictures import refuse_marks
from llm_trainer.data.formats.prompts import UNUSABLE_COLUMNS
from llm_trainer.data.labels import Ids
from llm_trainer.data.report import DataReport
from llm_trainer.readers.images import ImageError, ImageFolder, ImagePlace, Picture, find_image, inspect_image
from llm_trainer.readers.json import TooDeep, parse_json
from llm_trainer.readers.rows import BadRow, Chunk

CHUNK_ROWS = 500
CHUNK_ROWS_WITH_BYTES = 16
HUB_IMAGES = ImageFolder()
CHUNKS_A_PROCESS = 3  # chunks under way at once: enough to keep a process busy, few enough for the memory
MAX_QUOTED_ROW_CHARACTERS = 10_000  # characters of a bad row that rejected_rows.jsonl quotes
FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "length": Value("int32"),
        "digest": Value("uint64"),  # hash of the input_ids, to find duplicates
    }
)
# Of rows of answers, which may be several, one behind the other: how long each is.
ANSWER_FEATURES = Features({**FEATURES, "seq_lengths": List(Value("int32"))})
JUDGED_FEATURES = Features({**ANSWER_FEATURES, "desirable": Value("bool")})
# Of rows with images: where the encoded bytes of each are, or they themselves, and its tokens.
PICTURE = {
    "path": Value("string"),
    "offset": Value("int64"),
    "size": Value("int64"),
    "data": Value("large_binary"),  # as the images of a chunk of rows may have more than 2 GiB
    "name": Value("string"),
    "start": Value("int32"),
    "tokens": Value("int32"),
}
MARGIN_FEATURES = Features({**ANSWER_FEATURES, "margin": Value("float32")})
# Of prompts: the row as JSON text, as columns of an Arrow file have one type and those of rows need not.
PROMPT_FEATURES = Features({**FEATURES, "content": Value("string")})


@dataclass
class PreparedChunk:
    """A chunk's rows after preparation."""

    table: pa.Table
    report: DataReport
    rejected: list[dict[str, Any]] = field(default_factory=list)  # bad rows: file, row, reason and content


class Preparer:
    """Preparation of chunks of one source's raw rows into tokens and labels."""

    def __init__(
        self,
        encoder: Encoder,
        settings: DataSettings,
        row_format: str,
        first_place: str,
        folder: ImageFolder = HUB_IMAGES,
    ) -> None:
        """Take what tokenizes the rows, and the folder that their images may not leave."""
        self.encoder = encoder
        self.settings = settings
        self.row_format = row_format
        self.first_place = first_place  # the row that told the format, for messages
        self.has_chat_template = encoder.tokenizer.chat_template is not None
        self.read_fields = list_read_fields(row_format, settings, self.has_chat_template)
        self.fitter = Fitter(encoder, settings)
        self.features = choose_features(settings, encoder.vocabulary)
        self.folder = folder

    def prepare_chunk(self, chunk: Chunk) -> PreparedChunk:
        """Return the tokens and labels of a chunk's rows, the counts, and the rows that are bad."""
        report = DataReport()
        rejected: list[dict[str, Any]] = []

        def reject(index: int, reason: str) -> None:
            number = chunk.numbers[index]
            names_place = reason.startswith("line ")
            place = f"{chunk.file} {reason}" if names_place else describe_place(chunk, index, reason)
            report.note_bad_row(make_writable(place))
            row = {"file": chunk.file, "reason": reason, "content": quote_row(chunk.rows[index])}
            rejected.append({"row": number, **{name: make_writable(text) for name, text in row.items()}})

        examples: list[tuple[int, Example]] = []
        for index in range(len(chunk.rows)):
            try:
                examples.append((index, self.read_row(chunk, index, report)))
            except RowError as error:
                reject(index, str(error))
        kept = []
        for (index, _), rows in zip(examples, self.encode([example for _, example in examples]), strict=True):
            if isinstance(rows, RowError):
                reject(index, str(rows))
                continue
            fitting = (self.fitter.fit_row(row, report) for row in rows)
            kept += [row for row in fitting if row]
        return PreparedChunk(build_table(kept, self.features), report, rejected)

    def read_row(self, chunk: Chunk, index: int, report: DataReport) -> Example:
        """Return a row's example, with its images found. Raises RowError where the row is bad.

        Raises UserError for images where the method, the model or the job takes none at all.
        """
        try:
            example = self.read_example(parse_fields(chunk.rows[index], chunk.numbers[index]), report)
        except UntakenImagesError as error:
            raise UserError(describe_place(chunk, index, str(error))) from error
        return self.find_pictures(example, chunk, index)

    def encode(self, examples: list[Any]) -> Iterator[list[Sequences] | RowError]:
        """Yield the rows of each example, each with its sequences, or the error that says why there are none."""
        encode = {
            "preference": self.encoder.encode_pairs,
            "unpaired_preference": self.encoder.encode_judged,
            "prompt": self.encoder.encode_prompts,
        }
        encoded = encode.get(self.row_format, self.encoder.encode)(examples)  # type: ignore[operator]
        for row in encoded:
            if isinstance(row, RowError):
                yield row
            elif self.row_format != "preference":
                yield [(row,)]
            elif self.settings.sequences_a_row > 1:
                yield [row]
            else:
                chosen, rejected = row
                yield [(chosen,), (replace(rejected, is_desirable=False),)]

    def read_example(self, fields: Fields, report: DataReport) -> Example:
        """Parse a row's fields, and count what is odd about them. Raises RowError where the row is bad."""
        refuse_marks(fields)
        example = self.parse_fields_as_example(fields)
        report.note_unread_fields(self.list_unread_fields(fields, example))
        report.num_swapped_pairs += isinstance(example, Pair) and example.is_swapped
        if self.encoder.vocabulary.images is not None:
            report.num_rows_without_column += any(map(has_placeholder, list_sides(example)))
        return example

    def find_pictures(self, example: Example, chunk: Chunk, index: int) -> Example:
        """Return an example whose images are found and read to their end.

        Raises RowError where one cannot be used, and UserError where the model or the job takes no images at all.
        """
        if isinstance(example, Pair):
            return self.find_pictures_of_pair(example, chunk, index)
        if not isinstance(example, Conversation | Text) or not example.images:
            return example
        if problem := self.encoder.find_image_problem():
            raise UserError(f"{describe_place(chunk, index)} has images, {problem}")
        most, found = self.settings.max_images_per_row, len(example.images)
        if most is not None and found > most:
            raise RowError(
                f"has {found} images and max_images_per_row={most}: remove some, or raise max_images_per_row."
            )
        try:
            place = ImagePlace(chunk.path, self.folder)
            return replace(example, images=tuple(self.find_picture(value, place) for value in example.images))
        except ImageError as error:
            raise RowError(str(error)) from error

    def find_pictures_of_pair(self, pair: Pair, chunk: Chunk, index: int) -> Pair:
        """Return a pair whose images are found: once where both sides have the same. Raises as `find_pictures`."""
        chosen: Any = self.find_pictures(pair.chosen, chunk, index)
        if pair.rejected.images == pair.chosen.images:
            return replace(pair, chosen=chosen, rejected=replace(pair.rejected, images=chosen.images))
        rejected: Any = self.find_pictures(pair.rejected, chunk, index)
        return replace(pair, chosen=chosen, rejected=rejected)

    def find_picture(self, value: Any, place: ImagePlace) -> Picture:
        """Return the image that a row's value gives. Raises ImageError."""
        ref = find_image(value, place, self.encoder.image_rules)
        return Picture(ref, *inspect_image(ref, self.encoder.image_rules))

    def parse_fields_as_example(self, fields: Fields) -> Example:
        """Parse a row's fields. Raises RowError where the row is bad or has another format than the source."""
        found = detect_format(fields, self.settings)
        if found != self.row_format:
            raise RowError(
                f"is a {found} row and {self.first_place} is a {self.row_format} row: put each format into a channel "
                "of its own, such as train_a and train_b."
            )
        return parse_example(fields, found, self.settings, self.has_chat_template)

    def list_unread_fields(self, fields: Fields, example: Example) -> set[str]:
        """Name the fields of a row and of its messages that nothing reads."""
        unread = {name for name in fields.keys() - self.read_fields if fields[name]}
        if isinstance(example, Prompt):  # whose other columns go to the rewards
            unread &= UNUSABLE_COLUMNS
        for side in list_sides(example):
            if isinstance(side, Conversation):
                unread |= self.encoder.template.list_unread_fields(side)
        return unread


def parse_fields(raw: Any, number: int) -> Fields:
    """Return the fields of a row as its file has it.

    Raises RowError. A text that begins with "line" already names the row's place.
    """
    if isinstance(raw, bytes):
        try:
            raw = parse_json(raw.rstrip(b"\r\n"))
        except json.JSONDecodeError as error:
            raise RowError(
                f"line {number} is not valid JSON ({error.msg} at column {error.colno}): "
                "write one JSON object a line, or the whole file as one array."
            ) from error
        except UnicodeDecodeError as error:
            raise RowError(f"line {number} is not UTF-8 text ({error.reason}): save it as UTF-8.") from error
        except TooDeep as error:
            raise RowError(f"{error}: mend or remove the row.") from error
        except ValueError as error:
            raise RowError(f"{error}: keep one of them.") from error
    if isinstance(raw, BadRow):
        raise RowError(f"{raw.reason}: mend or remove the row.")
    if not isinstance(raw, dict):
        raise RowError(f"is a JSON {type(raw).__name__}: write each row as an object with named fields.")
    return raw


def describe_place(chunk: Chunk, index: int, reason: str = "") -> str:
    """Return a row's file and number, and a reason after them."""
    return f"{chunk.file} row {chunk.numbers[index]} {reason}".rstrip()


def quote_row(raw: Any) -> str:
    """Return a bad row as text, without secrets and queries of addresses, and cut to MAX_QUOTED_ROW_CHARACTERS."""
    text = raw.decode("utf-8", errors="replace") if isinstance(raw, bytes) else json.dumps(raw, default=str)
    return hide_queries(hide_known(text))[:MAX_QUOTED_ROW_CHARACTERS]


def make_writable(text: str) -> str:
    """Return a text with each half of a character as its escape, since neither file nor log takes it."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def choose_features(settings: DataSettings, vocabulary: Vocabulary | None = None) -> Features:
    """Return the columns of the method's rows, with images where the model takes some."""
    if settings.generates:
        return PROMPT_FEATURES
    if settings.method in IMAGE_METHODS and vocabulary is not None and vocabulary.images is not None:
        return Features({**(ANSWER_FEATURES if settings.has_answers else FEATURES), "pictures": List(PICTURE)})
    if settings.is_judged:
        return JUDGED_FEATURES
    if settings.trains_rewards:
        return MARGIN_FEATURES
    return ANSWER_FEATURES if settings.has_answers else FEATURES


def build_table(rows: list[Sequences], features: Features) -> pa.Table:
    """Return the rows as Arrow columns in the order of the features, without a Python object for each token."""
    ids = [np.concatenate([sequence.input_ids for sequence in row]) for row in rows]
    lengths = np.array([len(row) for row in ids], dtype=np.int32)
    digests = np.array([compute_row_digest(own, row) for own, row in zip(ids, rows, strict=True)], dtype=np.uint64)
    labels = [sequence.labels for row in rows for sequence in row]
    columns = [build_lists(ids, lengths), build_lists(labels, lengths), lengths, digests]
    if "seq_lengths" in features:
        own = [np.array([len(sequence.input_ids) for sequence in row], dtype=np.int32) for row in rows]
        columns.append(build_lists(own, np.array([len(row) for row in rows], dtype=np.int32)))
    if "desirable" in features:
        columns.append(np.array([row[0].is_desirable for row in rows], dtype=bool))
    if "margin" in features:
        columns.append(np.array([row[0].margin for row in rows], dtype=np.float32))
    if "pictures" in features:
        columns.append(pa.array(map(list_placed, rows), type=features.arrow_schema.field("pictures").type))
    if "content" in features:
        columns.append(pa.array([row[0].content for row in rows], type=pa.string()))
    return pa.table(dict(zip(features, columns, strict=True)))


def list_placed(row: Sequences) -> list[dict[str, Any]]:
    """Return the images of a row. Each starts at a token of the row, whose sequences stand one behind the other."""
    begins = itertools.accumulate((len(sequence.input_ids) for sequence in row), initial=0)
    return [
        {**vars(one), "start": begin + one.start}
        for sequence, begin in zip(row, begins, strict=False)
        for one in sequence.pictures
    ]


def compute_row_digest(ids: Ids, row: Sequences) -> int:
    """Return the hash of a row's tokens, and of its images where it has some."""
    digest = xxhash.xxh3_64(ids.tobytes())
    for placed in (placed for sequence in row for placed in sequence.pictures):
        digest.update(placed.data or f"{placed.path}\0{placed.offset}".encode())
    return digest.intdigest()


def build_lists(parts: list[Ids], lengths: Ids) -> pa.Array:
    """Return a column of lists with these lengths, filled from the parts one behind the other."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, type=pa.int32()))


def write_chunks(
    prepared_chunks: Generator[PreparedChunk, None, None],
    features: Features,
    arrow: Path,
    rejected_rows: Path,
    report: DataReport,
) -> None:
    """Write rows to an Arrow file and bad rows to a JSON Lines file, and count them in the report."""
    rejected_rows.touch()
    with (
        ArrowWriter(path=str(arrow), features=features) as writer,
        # Closed in any case, because processes that wait for more chunks would keep this one from ending.
        closing(prepared_chunks),
    ):
        for prepared in prepared_chunks:
            report.add_report(prepared.report)
            if len(prepared.table):
                writer.write_table(prepared.table)
            append_rows(rejected_rows, prepared.rejected)
        writer.finalize()


def find_format(chunks: Iterator[Chunk], settings: DataSettings) -> tuple[list[Chunk], str | None, str]:
    """Return the chunks up to the first row that tells its format, the format, and the row's place.

    Without such a row the chunks are all there are, the format is None and the place is empty. Raises UserError for a
    chunk whose rows are all of another method.
    """
    seen = []
    for chunk in chunks:
        seen.append(chunk)
        foreign = []
        for index, raw in enumerate(chunk.rows):
            try:
                row_format = detect_format(parse_fields(raw, chunk.numbers[index]), settings)
                return seen, row_format, describe_place(chunk, index)
            except OtherMethodError as error:
                foreign.append(describe_place(chunk, index, str(error)))
            except RowError:  # a bad row, which is counted when its turn comes
                continue
        if foreign:
            raise UserError(make_writable(foreign[0]))
    return seen, None, ""


def prepare_chunks(
    preparer: Preparer | None, chunks: Iterator[Chunk], num_processes: int
) -> Generator[PreparedChunk, None, None]:
    """Yield the chunks prepared, in their order, on that many processes; a single chunk in this process.

    Yields nothing without a preparer, where there is no chunk. Raises UserError where a process was killed.
    """
    if preparer is None:
        return
    first_two = list(itertools.islice(chunks, 2))
    chunks = itertools.chain(first_two, chunks)
    if num_processes == 1 or len(first_two) < 2:
        yield from map(preparer.prepare_chunk, chunks)
        return
    try:
        yield from prepare_in_pool(preparer, chunks, num_processes)
    except BrokenProcessPool as error:
        raise UserError(
            "A process that tokenizes was killed, most likely because the host ran out of memory: lower "
            f"dataset_num_proc (now {num_processes}), or use an instance with more memory."
        ) from error


def prepare_in_pool(
    preparer: Preparer, chunks: Iterator[Chunk], num_processes: int
) -> Generator[PreparedChunk, None, None]:
    """Yield the chunks prepared by a pool of processes, in their order.

    Raises BrokenProcessPool where a process was killed.
    """
    # Forked processes have tokenizer and libraries at once. They touch no GPU.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(
        num_processes, context, initializer=begin_process, initargs=(preparer, os.getpid())
    ) as pool:
        pending: deque[Future[PreparedChunk]] = deque()
        try:
            for chunk in chunks:
                pending.append(pool.submit(prepare_in_process, chunk))
                if len(pending) >= num_processes * CHUNKS_A_PROCESS:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)  # waits, because nobody would end the others after this process's end


process_preparer: Preparer  # set once in each process of the pool, and nowhere else: tasks would copy it each time


def begin_process(preparer: Preparer, parent: int) -> None:
    """Set up a process of the pool, which the process with the id `parent` has."""
    global process_preparer
    bind_to_parent(parent)
    gc.freeze()  # what the fork inherited is not searched for garbage, which would copy its memory
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process a core leaves no room for threads
    torch.set_num_threads(1)  # a processor of images would wait forever for threads that the fork left behind
    process_preparer = preparer


def prepare_in_process(chunk: Chunk) -> PreparedChunk:
    """Prepare a chunk in a process of the pool."""
    return process_preparer.prepare_chunk(chunk)
