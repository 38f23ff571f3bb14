# SPDX-License-Identifier: Apache-2.0
"""Batches of rows with images and of rows without: decoded and processed when they are needed, in a process beside."""

import io
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image

from llm_trainer.common.errors import UserError
from llm_trainer.data.formats.examples import IGNORED
from llm_trainer.data.formats.pictures import IMAGE_MARK
from llm_trainer.data.images.processing import ImageProcessing, Size, blank, find_part
from llm_trainer.data.images.processors import process_images
from llm_trainer.readers.images import ImageError, ImageRef, ImageRules, Picture, open_image

BLANK_SIDE = 32  # pixels of the white image that a batch of texts gets; processors enlarge what is too small

Row = dict[str, Any]


def find_ref(placed: Row) -> ImageRef:
    """Return where the encoded bytes of a row's image are."""
    return ImageRef(**{field.name: placed[field.name] for field in fields(ImageRef)})


def draw_blank_row(images: ImageProcessing, size: Size, number: int = 1) -> Row:
    """Return a tokenized row of so many white images of a height and width, and of nothing else.

    Raises UserError where the model's folder has no processor.
    """
    file, placeholders = io.BytesIO(), images.placeholders
    blank(size).save(file, "PNG")
    ref, rules = ImageRef(data=file.getvalue()), ImageRules(size[0] * size[1])
    pictures = (Picture(ref, *size),) * number
    text, _ = placeholders.expand(images.processor.image_token * number, None, pictures, rules)
    ids = placeholders.tokenize(text)
    placed = [{**vars(ref), "start": start, "tokens": end - start} for start, end in placeholders.locate(ids, pictures)]
    return {"input_ids": ids, "labels": ids, "pictures": placed}


@dataclass(frozen=True)
class ImageCollator:
    """Makes a batch of rows of tokens, padded at the right, with what the processor makes of their images.

    It is what the processor gives for the same conversations: the images of each row, in the order of the rows.

    Where weights are sharded, ranks gather those of each block of a model together, when they come to it. A rank whose
    batch has no image would not come to the tower, and the others would wait for it. With `always_sees` such a batch
    gets a white image behind the last token of its shortest row. No token before it sees it, and none is trained on. So
    the gradients are those without it, and the tower's are zero.
    """

    images: ImageProcessing
    rules: ImageRules
    pad_token_id: int
    pad_to_multiple_of: int | None = None
    always_sees: bool = False

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        """Return `input_ids`, `labels`, `attention_mask` [rows, slots] and the processor's tensors.

        Before a batch with a white image come the rows' tokens without it, `num_tokens` [rows], as in a packed batch.

        Raises UserError for an image that has changed since it was counted.
        """
        if not self.always_sees or any(row["pictures"] for row in rows):
            return self.collate(rows)
        lengths = [len(row["input_ids"]) * any(label != IGNORED for label in row["labels"]) for row in rows]
        return {"num_tokens": torch.tensor(lengths), **self.collate(self.add_blank(rows))}

    def add_blank(self, rows: list[Row]) -> list[Row]:
        """Return the rows with a white image at the end of the shortest one."""
        shortest = min(range(len(rows)), key=lambda number: len(rows[number]["input_ids"]))
        row, (placed,) = rows[shortest], self.blank_row["pictures"]
        tokens = self.blank_row["input_ids"][placed["start"] : placed["start"] + placed["tokens"]]
        placed = {**placed, "start": len(row["input_ids"])}
        longer = {"input_ids": [*row["input_ids"], *tokens], "labels": [*row["labels"], *[IGNORED] * len(tokens)]}
        return [*rows[:shortest], {**row, **longer, "pictures": [placed]}, *rows[shortest + 1 :]]

    @cached_property
    def blank_row(self) -> Row:
        """A row of a small white image."""
        return draw_blank_row(self.images, (BLANK_SIDE, BLANK_SIDE))

    def collate(self, rows: list[Row]) -> dict[str, Any]:
        """Return the batch of rows as they are."""
        ids = [np.asarray(row["input_ids"], dtype=np.int32) for row in rows]
        batch = {
            "input_ids": self.pad(ids, self.pad_token_id),
            "labels": self.pad([row["labels"] for row in rows], IGNORED),
            "attention_mask": self.pad([np.ones_like(own) for own in ids], 0),
        }
        if not any(row["pictures"] for row in rows):
            return batch
        made = self.process(rows, {name: own for name, own in batch.items() if name != "labels"})
        return batch | {name: widen(own) for name, own in made.items() if name not in batch}

    def pad(self, values: list[Any], filler: int) -> torch.Tensor:
        """Return the values of each row [rows, slots], filled up at the right."""
        slots = max(map(len, values))
        slots += -slots % (self.pad_to_multiple_of or 1)
        padded = torch.full((len(values), slots), filler)
        for number, own in enumerate(values):
            padded[number, : len(own)] = torch.as_tensor(own)
        return padded

    def process(self, rows: list[Row], tokens: dict[str, torch.Tensor]) -> Any:
        """Return what the processor makes of the rows' tokens and images.

        Raises UserError for an image that can no longer be used, or is another.
        """
        try:
            images = [[open_image(find_ref(placed), self.rules) for placed in row["pictures"]] for row in rows]
        except ImageError as error:
            raise UserError(f"A row {error}") from error
        try:
            made, written = self.run(images, tokens)
        except Exception:  # the code of any processor runs here; it counts tokens, and refuses shapes
            for row, own in zip(rows, images, strict=True):
                self.check_alone(row, own)
            raise
        for row, ids in zip(rows, written, strict=True):
            self.check_tokens(row, ids)
        return made

    def run(
        self, images: list[list[Image.Image]], tokens: dict[str, torch.Tensor] | None = None
    ) -> tuple[Any, list[list[int]]]:
        """Return what the processor makes of each row's images, and the tokens of the text that it writes for them.

        Marks stand between images: else two that changed places would have the tokens of before.
        """
        processor = self.images.processor
        texts = [IMAGE_MARK.join([processor.image_token] * len(own)) for own in images]
        made, written = process_images(processor, texts, images, tokens)
        return made, written.ids

    def check_alone(self, row: Row, images: list[Image.Image]) -> None:
        """Raise UserError where the images of a row are not those that the row was made of."""
        if not images:
            return
        try:
            _, (ids,) = self.run([images])
        except Exception as error:  # the code of any processor runs here
            raise UserError(describe_change(row)) from error
        self.check_tokens(row, ids)

    def check_tokens(self, row: Row, ids: list[int]) -> None:
        """Raise UserError where the tokens that the processor writes for a row's images are not those of the row."""
        whole, begin = np.array(ids, dtype=np.int32), 0
        is_left = np.isin(whole, self.images.placeholders.image_tokens)
        for placed in row["pictures"]:
            tokens = np.asarray(row["input_ids"][placed["start"] : placed["start"] + placed["tokens"]], dtype=np.int32)
            begin = find_part(whole, tokens, begin)
            if begin < 0:
                raise UserError(describe_change(row))
            is_left[begin : begin + len(tokens)] = False
            begin += len(tokens)
        if is_left.any():
            raise UserError(describe_change(row))


def widen(values: Any) -> Any:
    """Return numbers of 16 bit, which some processors give, as those of 32 that weights of any kind take."""
    return values.float() if isinstance(values, torch.Tensor) and values.is_floating_point() else values


def describe_change(row: Row) -> str:
    """Return the sentence for the user about a row whose images are no longer those that were counted."""
    names = ", ".join(dict.fromkeys(find_ref(placed).describe() for placed in row["pictures"]))
    return f"A row has {names}, of another size than when the data were read: leave images alone while a job runs."
