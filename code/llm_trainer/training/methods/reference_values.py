# SPDX-License-Identifier: Apache-2.0
"""The reference's log-probabilities of all rows, computed before the first step where no adapter can be switched off.

They are kept in the cache by their content: the model, the rows, and all that decides how the one computes the other.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import trl
import xxhash
from accelerate import Accelerator
from datasets import Dataset

from llm_trainer.common import log
from llm_trainer.common.ranks import local_rank
from llm_trainer.host.kept_folders import find_folder, write_folder
from llm_trainer.training.methods.answers import ANSWERS
from llm_trainer.training.resume import make_gather

VALUES = "values.npy"
HASHED_ROWS = 1000  # at once
HASHED_COLUMNS = ("input_ids", "labels", "seq_lengths", "row", "other_ids", "other_labels")


def build_key(content: dict[str, Any], rows: Dataset) -> str:
    """Return the name of a split's values: a digest of what they are made of, with the versions of the libraries."""
    parts = [json.dumps(content, sort_keys=True, default=str), torch.__version__, trl.__version__]
    return hashlib.sha256("\n".join([*parts, hash_rows(rows)]).encode()).hexdigest()[:32]


def hash_rows(rows: Dataset) -> str:
    """Return a checksum of the tokens, labels and numbers of rows, in their order."""
    checksum = xxhash.xxh3_128()
    names = [name for name in rows.column_names if name in HASHED_COLUMNS]
    for table in rows.select_columns(names).with_format("arrow").iter(HASHED_ROWS):
        for column in table.columns:
            array = column.combine_chunks()
            values = array.values if hasattr(array, "values") else array
            checksum.update(values.to_numpy(zero_copy_only=False).tobytes())
    return checksum.hexdigest()


def load_values(key: str, num_rows: int, group: dist.ProcessGroup | None) -> torch.Tensor | None:
    """Return kept values, or None where a host has none that are sound. Every rank must call this."""
    folder = find_folder("reference", key, "The reference's log-probabilities")
    if not all(make_gather(group)(folder.is_dir())):
        return None
    log.info(f"The reference's log-probabilities of {num_rows} rows are those of an earlier job")
    return torch.from_numpy(np.load(folder / VALUES))


def keep_values(key: str, values: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Keep values in each host's cache. Every rank must call this."""
    if local_rank() == 0:
        folder = find_folder("reference", key, "The reference's log-probabilities")
        if not folder.is_dir():
            write_folder(folder, lambda unfinished: np.save(unfinished / VALUES, values.numpy()), "writing a cache")
    make_gather(group)(True)  # no rank looks before they are there


@torch.no_grad()
def compute_values(
    batches: Iterable[dict[str, Any]],
    num_values: int,
    accelerator: Accelerator,
    ask: Callable[[dict[str, Any]], torch.Tensor],
) -> torch.Tensor:
    """Return what `ask` says of a split's rows, [num_values, 2] in float32, by the numbers of the rows.

    `batches` are this rank's, and those of all ranks have each row once. Every rank must call this.
    """
    values = torch.zeros(num_values, 2, dtype=torch.float32, device=accelerator.device)
    for batch in batches:
        said = ask(batch)
        if not batch[ANSWERS].is_blank:
            values[batch[ANSWERS].rows] = said.float()
    return accelerator.reduce(values).cpu()  # the other ranks have zeros where this one has values
