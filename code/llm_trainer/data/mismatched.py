# SPDX-License-Identifier: Apache-2.0
"""Mismatched answers, on which KTO estimates how far the model has moved: each prompt with an answer to another one.

TRL pairs the prompts of a batch with each other's answers. Here each prompt has one answer for the whole run, drawn
from all rows: the same on any ranks and in any order of rows.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets.arrow_writer import ArrowWriter

from llm_trainer.common.ranks import run_on_local_rank_zero
from llm_trainer.config.sections import DataSettings
from llm_trainer.data.formats.examples import IGNORED
from llm_trainer.data.labels import Ids
from llm_trainer.data.tokenize import build_lists

FEATURES = Features({"other_ids": List(Value("int32")), "other_labels": List(Value("int32"))})
ROWS_AT_ONCE = 1000
DRAW_SEED = 0  # not the job's, so that kept values of a reference serve jobs of other seeds

Row = dict[str, Any]


def add_mismatched(rows: Dataset, settings: DataSettings, folder: Path) -> Dataset:
    """Return the rows with a mismatched answer each, memory-mapped. One process a host writes them into the folder."""
    arrow = folder / "mismatched.arrow"

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with ArrowWriter(path=str(arrow), features=FEATURES) as writer:
            for table in build_tables(rows, settings):
                writer.write_table(table)
            writer.finalize()

    run_on_local_rank_zero(folder.with_suffix(".mismatched"), write)
    return concatenate_datasets([rows, Dataset.from_file(str(arrow))], axis=1)


def build_tables(rows: Dataset, settings: DataSettings) -> Iterator[pa.Table]:
    """Yield the mismatched answers of the rows, so many rows at once."""
    tokens = rows.select_columns(["input_ids", "labels"]).with_format("numpy")
    others = tokens.select(draw_others(len(rows)))
    for first in range(0, len(rows), ROWS_AT_ONCE):
        places = range(first, min(first + ROWS_AT_ONCE, len(rows)))
        made = [mismatch(tokens[place], others[place], settings) for place in places]
        columns = zip(*made, strict=True)
        yield pa.table({name: build_lists([*own], measure(own)) for name, own in zip(FEATURES, columns, strict=True)})


def draw_others(num_rows: int) -> npt.NDArray[np.int64]:
    """Return for each row the place of another one, whose answer it gets; each answer comes once."""
    order = np.random.default_rng(DRAW_SEED).permutation(num_rows)
    others = np.empty_like(order)
    others[order] = np.roll(order, 1)
    return others


def mismatch(row: Row, other: Row, settings: DataSettings) -> tuple[Ids, Ids]:
    """Return ids and labels of a row's prompt with another row's answer, cut as rows are."""
    prompt = row["input_ids"][: find_answer(row)]
    answer = slice(find_answer(other), None)
    ids = np.concatenate([prompt, other["input_ids"][answer]])
    labels = np.concatenate([np.full_like(prompt, IGNORED), other["labels"][answer]])
    limit = settings.max_length
    kept = slice(limit) if settings.truncation_mode != "keep_end" or limit is None else slice(-limit, None)
    return ids[kept], labels[kept]


def find_answer(row: Row) -> int:
    """Return the place of a row's first token that is trained on."""
    return int(np.argmax(row["labels"] != IGNORED))


def measure(parts: tuple[Ids, ...]) -> Ids:
    """Return the length of each part."""
    return np.array([len(part) for part in parts], dtype=np.int32)
