# SPDX-License-Identifier: Apache-2.0
"""The tensors that a processor makes of the images of rows, as far as memory and time of a step depend on them."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset

from llm_trainer.config.sections import DataSettings
from llm_trainer.data.images.collator import ImageCollator, draw_blank_row
from llm_trainer.data.images.processing import ImageProcessing
from llm_trainer.readers.images import ImageRules


@dataclass(frozen=True, eq=False)
class RowImages:
    """The tensors of the images of some rows. Pixels have a shape alone, on the meta device."""

    inputs: dict[str, torch.Tensor]
    num_rows: int = 1
    mean_share: float = 1.0  # the tokens of images in the mean row of the data, as a share of those here
    longest_text: int = 0  # tokens of the data's longest sequence without images, with the white image that it may get

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> "RowImages | None":
        """Return the images of a batch that a collator has made; None where it has none."""
        tensors = {
            name: value.to("meta") if value.is_floating_point() else value
            for name, value in batch.items()
            if isinstance(value, torch.Tensor) and value.ndim and value.shape != batch["input_ids"].shape
        }
        return cls(tensors, len(batch["input_ids"])) if any(each.is_meta for each in tensors.values()) else None

    def repeat(self, num_rows: int) -> dict[str, torch.Tensor]:
        """Return the tensors of so many rows with the same images, one after the other."""
        times = -(-num_rows // self.num_rows)
        return {name: torch.cat([value] * times) for name, value in self.inputs.items()}

    def count_bytes(self, num_rows: int) -> int:
        """Return the bytes of so many rows' tensors."""
        return sum(value.nbytes for value in self.inputs.values()) * num_rows // self.num_rows


def find_row_images(
    splits: Iterable[Dataset], images: ImageProcessing | None, settings: DataSettings
) -> RowImages | None:
    """Return the images of the row with the most tokens of images, as the processor makes them; None without any.

    Raises UserError for an image that can no longer be used.
    """
    tables = [rows.data.table for rows in splits if "pictures" in rows.column_names]
    if images is None or not tables:
        return None
    collator = ImageCollator(images, ImageRules(settings.max_image_pixels), pad_token_id=0)
    counted = [count_image_tokens(table["pictures"]) for table in tables]
    table, tokens = max(zip(tables, counted, strict=True), key=lambda each: each[1].max(initial=0))
    if not tokens.max(initial=0):
        return None
    (row,) = table.slice(int(tokens.argmax()), 1).to_pylist()
    made = RowImages.of(collator(split_row(row)))
    share = float(np.concatenate(counted).mean() / tokens.max())
    (white,) = collator.blank_row["pictures"]
    longest_text = max(map(measure_longest_text, tables, counted))
    longest_text += white["tokens"] if longest_text else 0
    return made and replace(made, mean_share=share, longest_text=longest_text)


def split_row(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each sequence of a row as a row, with its own images. Rows of one sequence do not tell its length."""
    edges = itertools.accumulate(row.get("seq_lengths", [len(row["input_ids"])]), initial=0)
    return [
        {
            "input_ids": row["input_ids"][start:end],
            "labels": row["labels"][start:end],
            "pictures": [
                {**placed, "start": placed["start"] - start}
                for placed in row.get("pictures", ())
                if start <= placed["start"] < end
            ],
        }
        for start, end in itertools.pairwise(edges)
    ]


@dataclass(frozen=True, eq=False)
class DrawnImages:
    """Images of a row that stand for those of data which are not there."""

    images: RowImages | None = None
    num_tokens: int = 0


def draw_row_images(number: int, size: tuple[int, int], images: ImageProcessing) -> DrawnImages:
    """Return a row of so many white images of a width and height, as the processor makes them.

    Raises UserError where the model's folder has no processor.
    """
    row, rules = draw_blank_row(images, (size[1], size[0]), number), ImageRules(size[0] * size[1])
    made = ImageCollator(images, rules, pad_token_id=0)([row])
    return DrawnImages(RowImages.of(made), sum(placed["tokens"] for placed in row["pictures"]))


def measure_longest_text(table: pa.Table, image_tokens: npt.NDArray[np.float64]) -> int:
    """Return the tokens of the longest sequence in rows without images; 0 where all rows have some."""
    lengths = table["seq_lengths" if "seq_lengths" in table.column_names else "length"]
    texts = lengths.filter(pa.array(image_tokens == 0))
    return pc.max(pc.list_flatten(texts) if pa.types.is_list(texts.type) else texts).as_py() or 0


def count_image_tokens(pictures: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    """Return the tokens of each row's images. Their encoded bytes are not read."""
    counts: list[npt.NDArray[Any]] = [np.zeros(0)]
    for chunk in pictures.chunks:
        rows, tokens = pc.list_parent_indices(chunk).to_numpy(), chunk.flatten().field("tokens").to_numpy()
        counts.append(np.bincount(rows, weights=tokens, minlength=len(chunk)))
    return np.concatenate(counts)
