# SPDX-License-Identifier: Apache-2.0
"""Images of a row for a person: a few words in place of their tokens, and a thumbnail of each of the first."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeVar

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from llm_trainer.common.log import show_line
from llm_trainer.data.images.collator import find_ref
from llm_trainer.journal.records import ShownImage
from llm_trainer.readers.images import ImageError, ImageRules, open_image
from llm_trainer.readers.thumbnails import MAX_A_ROW, describe_image, write_thumbnail

MAX_ROWS = 1000  # among which a row with images is looked for

Token = TypeVar("Token")
Piece = int | str  # a token, or the words for an image


def find_shown_row(datasets: Iterable[Dataset]) -> dict[str, Any] | None:
    """Return the first row, or the first with images where there is one among the first rows; None without rows."""
    first = None
    for rows in datasets:
        for row in rows.select(range(min(MAX_ROWS, len(rows)))):
            first = first or row
            if row.get("pictures"):
                return dict(row)
            if "pictures" not in row:
                break
    return first


def list_pictures(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the images of a row; of a pair those of its chosen side, which are the rejected one's, too."""
    first_length = (row.get("seq_lengths") or [len(row["input_ids"])])[0]
    return [placed for placed in row.get("pictures") or () if placed["start"] < first_length]


def show_images(pictures: Sequence[dict[str, Any]], rules: ImageRules, num_thumbnails: int) -> list[ShownImage]:
    """Return what is told of a row's images: all by name, size and tokens, the first of them with thumbnails."""
    return [
        show_image(placed, rules, with_thumbnail=number < min(num_thumbnails, MAX_A_ROW))
        for number, placed in enumerate(pictures)
    ]


def show_image(placed: dict[str, Any], rules: ImageRules, with_thumbnail: bool) -> ShownImage:
    """Return what is told of an image. One that can no longer be opened has no size."""
    ref = find_ref(placed)
    shown = ShownImage(name=show_line(ref.title), start=placed["start"], tokens=placed["tokens"])
    try:
        image = open_image(ref, rules)
    except ImageError:
        return shown
    shown |= {"width": image.width, "height": image.height}
    return shown | {"thumbnail": write_thumbnail(image)} if with_thumbnail else shown


def replace_images(
    tokens: Sequence[Token], images: Sequence[ShownImage], write: Callable[[str], Token], first: int = 0
) -> list[Token]:
    """Return tokens of a row, from its `first` on, with a few words in place of those of each image.

    `write` makes a token of words.
    """
    replaced, begin = [], 0
    for number, image in enumerate(images, 1):
        start = image["start"] - first
        if 0 <= start < len(tokens):
            replaced += [*tokens[begin:start], write(f"[image {number}: {describe_image(image)}]")]
            begin = start + image["tokens"]
    return [*replaced, *tokens[begin:]]


def decode_pieces(pieces: Iterable[Piece], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of tokens, and the words among them as they are."""
    texts = (
        "".join(map(str, own)) if kind is str else tokenizer.decode(list(own)) for kind, own in groupby(pieces, type)
    )
    return "".join(texts)
