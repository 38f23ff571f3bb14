# SPDX-License-Identifier: Apache-2.0
"""One source's rows -> an Arrow file of tokens and labels, on all cores, in the order of the rows.

This process reads the files and writes the result; others parse, render and tokenize the chunks between.
"""

import gc
import itertools
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from datasets import Features, List, Value
from datasets.arrow_writer import ArrowWriter

from llm_trainer.common.errors import UserError
from llm_trainer.common.processes import die_with_parent
from llm_trainer.config.schema import Settings
from llm_trainer.data.encoding import EncodedRow, Encoder, Ids
from llm_trainer.data.formats import IGNORED, Example, Fields, RowError, detect_format, parse_example
from llm_trainer.data.report import DataReport
from llm_trainer.readers.json import parse_json
from llm_trainer.readers.rows import BadRow, Chunk

CHUNK_ROWS = 500
CHUNKS_A_PROCESS = 3  # under way at once: enough to keep a process busy, few enough for the memory
MAX_QUOTED_ROW_CHARACTERS = 10_000  # of a bad row, in rejected_rows.jsonl
FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "length": Value("int32"),
        "digest": Value("uint64"),  # of the input_ids, to find the same row elsewhere
    }
)


@dataclass
class PreparedChunk:
    """What became of a chunk's rows."""

    table: pa.Table
    report: DataReport
    rejected: list[dict[str, Any]] = field(default_factory=list)  # file, row, reason and the row itself


class Preparer:
    """Turns chunks of one source's raw rows into tokens and labels."""

    def __init__(self, encoder: Encoder, settings: Settings, row_format: str, first_place: str) -> None:
        self.encoder = encoder
        self.settings = settings
        self.row_format = row_format
        self.first_place = first_place  # of the row that the format was found in, for messages

    def prepare(self, chunk: Chunk) -> PreparedChunk:
        report = DataReport()
        rejected: list[dict[str, Any]] = []

        def reject(index: int, reason: str) -> None:
            number = chunk.numbers[index]
            report.note_bad_row(f"{chunk.file} {reason}" if reason.startswith("line ") else place(chunk, index, reason))
            rejected.append({"file": chunk.file, "row": number, "reason": reason, "content": quote(chunk.rows[index])})

        examples: list[tuple[int, Example]] = []
        for index, raw in enumerate(chunk.rows):
            try:
                fields = parse_fields(raw, chunk.numbers[index])
                examples.append((index, self.parse(fields)))
            except RowError as error:
                reject(index, str(error))
        kept = []
        for (index, _), row in zip(examples, self.encoder.encode([example for _, example in examples]), strict=True):
            if isinstance(row, RowError):
                reject(index, str(row))
            elif fitting := self.fit(row, report):
                kept.append(fitting)
        return PreparedChunk(build_table(kept), report, rejected)

    def parse(self, fields: Fields) -> Example:
        found = detect_format(fields, self.settings)
        if found != self.row_format:
            raise RowError(
                f"is a {found} row and {self.first_place} is a {self.row_format} row: put each format into a channel "
                "of its own, such as train_a and train_b."
            )
        has_chat_template = self.encoder.tokenizer.chat_template is not None
        return parse_example(fields, found, self.settings, has_chat_template)

    def fit(self, row: EncodedRow, report: DataReport) -> EncodedRow | None:
        """The row cut to max_length, or None where it is left out; counts it."""
        limit, length = self.settings.data.max_length, len(row.input_ids)
        report.lengths[length] += 1
        if limit is not None and length > limit:
            if not self.settings.data.apply_truncation:
                report.num_dropped_rows += 1
                return None
            report.num_truncated_rows += 1
            kept = slice(-limit, None) if self.settings.data.truncation_mode == "keep_end" else slice(limit)
            row = EncodedRow(row.input_ids[kept], row.labels[kept])
        is_trained = row.labels != IGNORED
        is_trained[0] = False  # nothing predicts a row's first token
        num_supervised = int(np.count_nonzero(is_trained))
        if not num_supervised:
            report.num_unsupervised_rows += 1
            return None
        is_stop = self.encoder.find_stops(row.input_ids)
        # A turn that is trained on, without the stop token that ends it.
        misses_stop = is_stop[1:] & ~is_trained[1:] & is_trained[:-1] & ~is_stop[:-1]
        report.num_rows += 1
        report.num_tokens += len(row.input_ids)
        report.num_supervised_tokens += num_supervised
        report.num_supervised_eos += bool((is_stop & is_trained).any())
        report.num_missed_stops += bool(misses_stop.any())
        return row


def parse_fields(raw: Any, number: int) -> Fields:
    """The fields of a row as it stands in its file. Raises RowError; one that begins with "line" names the place."""
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
        except ValueError as error:
            raise RowError(f"{error}: keep one of them.") from error
    if isinstance(raw, BadRow):
        raise RowError(f"{raw.reason}: mend or remove the row.")
    if not isinstance(raw, dict):
        raise RowError(f"is a JSON {type(raw).__name__}: write each row as an object with named fields.")
    return raw


def place(chunk: Chunk, index: int, reason: str = "") -> str:
    return f"{chunk.file} row {chunk.numbers[index]} {reason}".rstrip()


def quote(raw: Any) -> str:
    """A bad row as text, cut where it is very long."""
    text = raw.decode("utf-8", errors="replace") if isinstance(raw, bytes) else json.dumps(raw, default=str)
    return text[:MAX_QUOTED_ROW_CHARACTERS]


def build_table(rows: list[EncodedRow]) -> pa.Table:
    """The rows as Arrow columns, without a Python object a token."""
    lengths = np.array([len(row.input_ids) for row in rows], dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    digests = np.array([xxhash.xxh3_64_intdigest(row.input_ids.tobytes()) for row in rows], dtype=np.uint64)

    def join(columns: list[Ids]) -> pa.Array:
        values = np.concatenate(columns) if columns else np.zeros(0, dtype=np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, type=pa.int32()))

    columns = [join([row.input_ids for row in rows]), join([row.labels for row in rows]), lengths, digests]
    return pa.table(dict(zip(FEATURES, columns, strict=True)))


def prepare(
    chunks: Iterable[Chunk],
    settings: Settings,
    build_encoder: Callable[[str], Encoder],
    arrow: Path,
    rejected_rows: Path,
    num_processes: int,
    report: DataReport,
) -> None:
    """Write the rows of a source to an Arrow file and its bad ones to a JSON Lines file; counts them in the report.

    Raises UserError where no row could be used whatever it holds.
    """
    chunks = iter(chunks)
    seen, row_format, first_place = find_format(chunks, settings)
    # Without a row to tell the format, every row is bad, and any format will find out why. A host's shard may be empty.
    known_format = row_format or "messages"
    preparer = Preparer(build_encoder(known_format), settings, known_format, first_place) if seen else None
    with (
        ArrowWriter(path=str(arrow), features=FEATURES) as writer,
        rejected_rows.open("w", encoding="utf-8") as rejected,
        # Closed in any case: processes that wait for more would keep this one from ending.
        closing(run(preparer, itertools.chain(seen, chunks), num_processes)) as prepared_chunks,
    ):
        for prepared in prepared_chunks:
            report.add(prepared.report)
            if len(prepared.table):
                writer.write_table(prepared.table)
            for row in prepared.rejected:
                rejected.write(json.dumps(row, ensure_ascii=False) + "\n")
        writer.finalize()


def find_format(chunks: Iterator[Chunk], settings: Settings) -> tuple[list[Chunk], str | None, str]:
    """The chunks up to the first row whose format can be told, that format, and the row's place."""
    seen = []
    for chunk in chunks:
        seen.append(chunk)
        for index, raw in enumerate(chunk.rows):
            try:
                return seen, detect_format(parse_fields(raw, chunk.numbers[index]), settings), place(chunk, index)
            except RowError:  # a bad row, which is counted when its turn comes
                continue
    return seen, None, ""


def run(preparer: Preparer | None, chunks: Iterator[Chunk], num_processes: int) -> Generator[PreparedChunk, None, None]:
    """The chunks prepared, in their order; in this process if there is but one. Without a preparer there is none."""
    if preparer is None:
        return
    first_two = list(itertools.islice(chunks, 2))
    chunks = itertools.chain(first_two, chunks)
    if num_processes == 1 or len(first_two) < 2:
        yield from map(preparer.prepare, chunks)
        return
    # Forked, so that a process has tokenizer and libraries at once; it touches neither torch nor a GPU.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(num_processes, context, initializer=begin, initargs=(preparer,)) as pool:
        pending: deque[Future[PreparedChunk]] = deque()
        try:
            for chunk in chunks:
                pending.append(pool.submit(prepare_chunk, chunk))
                if len(pending) >= num_processes * CHUNKS_A_PROCESS:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "A process that tokenizes was killed, most likely because the host ran out of memory: lower "
                f"dataset_num_proc (now {num_processes}), or use an instance with more memory."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)  # and wait: at this process's end nobody would tell the others to end


current: Preparer  # of a process of the pool


def begin(preparer: Preparer) -> None:
    """Set up a process of the pool."""
    global current
    die_with_parent()
    gc.freeze()  # what was there before is neither searched for garbage nor, by that, copied
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core is all the parallelism there is to have
    current = preparer


def prepare_chunk(chunk: Chunk) -> PreparedChunk:
    return current.prepare(chunk)
