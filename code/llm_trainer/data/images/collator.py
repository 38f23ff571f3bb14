# SPDX-License-Identifier: Apache-2.0
"""Batches of rows with images and of rows without: decoded and processed when they are needed, in a process beside."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from llm_trainer.common.errors import UserError
from llm_trainer.data.formats.examples import IGNORED
from llm_trainer.data.images.processing import ImageProcessing, find_part, process_images
from llm_trainer.data.labels import Ids
from llm_trainer.readers.images import ImageError, ImageRef, ImageRules, open_image

TEXT_INPUTS = ("input_ids", "attention_mask")  # of the placeholders alone
TOKEN_TYPES = "mm_token_type_ids"
PLACE = ("path", "offset", "size", "data")  # of an image's encoded bytes

Row = dict[str, Any]


def find_ref(placed: Row) -> ImageRef:
    """Return where the encoded bytes of a row's image are."""
    return ImageRef(**{name: placed[name] for name in PLACE})


@dataclass(frozen=True)
class ImageCollator:
    """Makes a batch of rows of tokens, padded at the right, with what the processor makes of their images.

    It is what the processor gives for the same conversations: the images of each row, in the order of the rows.
    """

    images: ImageProcessing
    rules: ImageRules
    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        """Return `input_ids`, `labels`, `attention_mask` [rows, slots] and the processor's tensors.

        Raises UserError for an image that has changed since it was counted.
        """
        ids = [np.asarray(row["input_ids"], dtype=np.int32) for row in rows]
        batch = {
            "input_ids": self.pad(ids, self.pad_token_id),
            "labels": self.pad([row["labels"] for row in rows], IGNORED),
            "attention_mask": self.pad([np.ones_like(own) for own in ids], 0),
        }
        if not any(row["pictures"] for row in rows):
            return batch
        made = self.process(rows)
        types = self.find_types(rows, ids, made)
        batch |= {name: value for name, value in made.items() if name not in (*TEXT_INPUTS, TOKEN_TYPES)}
        return batch | ({TOKEN_TYPES: self.pad(types, 0)} if types else {})

    def pad(self, values: list[Any], filler: int) -> torch.Tensor:
        """Return the values of each row [rows, slots], filled up at the right."""
        slots = max(map(len, values))
        slots += -slots % (self.pad_to_multiple_of or 1)
        padded = torch.full((len(values), slots), filler)
        for number, own in enumerate(values):
            padded[number, : len(own)] = torch.as_tensor(own)
        return padded

    def process(self, rows: list[Row]) -> Any:
        """Return what the processor makes of the images. Raises UserError for one that can no longer be used."""
        try:
            opened = [[open_image(find_ref(placed), self.rules) for placed in row["pictures"]] for row in rows]
        except ImageError as error:
            raise UserError(f"A row {error}") from error
        options = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
        return process_images(self.images.processor, opened, **options)

    def find_types(self, rows: list[Row], ids: list[Ids], made: Any) -> list[Ids]:
        """Return the types of each row's tokens, as the processor tells them; none where it tells none.

        Raises UserError where the tokens of an image are not those that the row has.
        """
        types = [np.zeros_like(own) for own in ids]
        for number, row in enumerate(rows):
            whole, begin = made["input_ids"][number].numpy(), 0
            is_left = whole == self.image_token
            for placed in row["pictures"]:
                place = slice(placed["start"], placed["start"] + placed["tokens"])
                begin = max(0, find_part(whole, ids[number][place], begin))
                end = begin + placed["tokens"]
                if not np.array_equal(whole[begin:end], ids[number][place]):
                    raise UserError(describe_change(row))
                is_left[begin:end] = False
                if TOKEN_TYPES in made:
                    types[number][place] = made[TOKEN_TYPES][number][begin:end].numpy()
                begin = end
            if is_left.any():
                raise UserError(describe_change(row))
        return types if TOKEN_TYPES in made else []

    @cached_property
    def image_token(self) -> int:
        """The token that stands for a piece of an image."""
        processor = self.images.processor
        return int(processor.tokenizer.convert_tokens_to_ids(processor.image_token))


def describe_change(row: Row) -> str:
    """Return the sentence for the user about a row whose images are no longer those that were counted."""
    names = ", ".join(find_ref(placed).describe() for placed in row["pictures"])
    return f"A row has {names}, of another size than when the data were read: leave images alone while a job runs."
