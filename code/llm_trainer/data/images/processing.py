# SPDX-License-Identifier: Apache-2.0
"""The model's own processor of images, and the text that it writes in place of an image's placeholder.

The text depends on the size of an image alone. It is counted where the processor tells its tokens by the size. Else
the processor is run once for each size, on a white image. The first images are processed themselves, to compare.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.data.formats.examples import RowError
from llm_trainer.data.formats.pictures import IMAGE_MARK
from llm_trainer.data.images.processors import FILES, load_processor, process_images
from llm_trainer.data.labels import Ids
from llm_trainer.readers.images import ImageRef, ImageRules, Picture, open_image

Size = tuple[int, int]  # height and width in pixels
Span = tuple[int, int]

# Sizes that tell whether an image is a number of equal tokens: large ones, of both shapes, and no square alone.
PROBE_SIZES: tuple[Size, ...] = ((336, 1344), (1344, 336), (700, 930), (64, 96))
PROBE_TEXT = "a{0}b{0}{0} c\n{0}\n"  # of images beside letters, white space and each other
# Options that save most of the time of processing an image, whose text depends on no pixel.
COARSE = {"resample": Image.Resampling.NEAREST, "do_rescale": False, "do_normalize": False}
NUM_COMPARED = 3  # images of a process that are processed themselves, to compare


@dataclass(frozen=True)
class ImageProcessing:
    """The processor of a model that takes images. It is loaded when the first image comes."""

    folder: str
    image_token_id: int | None = None
    trust_remote_code: bool = False
    options: dict[str, Any] = field(default_factory=dict)  # in place of those in the files

    @cached_property
    def fingerprint(self) -> str:
        """The digest of the files and the options that decide which tokens an image becomes."""
        files = sorted({file for pattern in FILES for file in Path(self.folder).glob(pattern)})
        digest = hashlib.sha256(json.dumps(self.options, sort_keys=True).encode())
        for file in files:
            digest.update(f"{file.name}\0".encode() + file.read_bytes())
        return digest.hexdigest()

    @cached_property
    def processor(self) -> Any:
        """The processor. Raises UserError where the folder has none that can be loaded, or that takes the options."""
        return load_processor(self.folder, self.trust_remote_code, self.options)

    @cached_property
    def placeholders(self) -> "Placeholders":
        """The texts of images. Raises UserError as `processor` does, and where the processor tells no texts."""
        return Placeholders(self.processor)


@dataclass(eq=False)
class Placeholders:
    """The text, and its tokens, that a processor writes in place of an image's placeholder."""

    processor: Any
    texts: dict[Size, str] = field(default_factory=dict)
    tokens: dict[str, Ids] = field(default_factory=dict)
    numbers: dict[tuple[Size, ...], list[int]] = field(default_factory=dict)  # of tokens, of images in one text
    num_compared: int = 0

    def __post_init__(self) -> None:
        """Try the processor. Raises UserError where rows with images cannot be trained on with it."""
        try:
            text = self.write_blank(PROBE_SIZES[0])
        except Exception as error:  # the code of any processor runs here
            self.refuse(f"does not tell which tokens an image becomes ({quote_error(error)})", error)
        if not np.isin(self.tokenize(text), self.image_tokens).any():
            self.refuse("writes no token for an image")

    def refuse(self, reason: str, error: Exception | None = None) -> NoReturn:
        """Raise UserError for a processor that cannot be trained with."""
        raise UserError(
            f"The model's {type(self.processor).__name__} {reason}: rows with images cannot be trained on with this "
            "model; remove the images."
        ) from error

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """The placeholder of an image: the processor's, or the mark that a template has left as it is."""
        return re.compile(f"{re.escape(self.processor.image_token)}|{IMAGE_MARK}")

    @cached_property
    def image_tokens(self) -> list[int]:
        """The tokens that stand for the pieces of an image."""
        given = [token for token in getattr(self.processor, "image_token_ids", ()) if token is not None]
        return given or [int(self.processor.tokenizer.convert_tokens_to_ids(self.processor.image_token))]

    @cached_property
    def piece(self) -> str:
        """The text of the token that stands for a piece of an image."""
        return str(self.processor.tokenizer.convert_ids_to_tokens(self.image_tokens[0]))

    @cached_property
    def is_joined(self) -> bool:
        """True where an image's text depends on what stands beside it, such as a space that Idefics2 writes then."""
        text, size = PROBE_TEXT.format(self.processor.image_token), PROBE_SIZES[-1]
        alone = self.write_blank(size)
        return self.process_blank(text, [size] * PROBE_TEXT.count("{0}")) != PROBE_TEXT.format(alone)

    @cached_property
    def frame(self) -> tuple[str, str] | None:
        """The texts around the image tokens, where an image is a number of equal tokens; None where it is not."""
        found = set()
        for size in PROBE_SIZES:
            begin, tokens, end = self.split(self.write_blank(size))
            if tokens != self.piece * self.count(size) or not tokens:
                return None
            found.add((begin, end))
        return found.pop() if len(found) == 1 else None

    def split(self, text: str) -> tuple[str, str, str]:
        """Return a text's part before its first image token, up to its last one, and after it."""
        first, last = text.find(self.piece), text.rfind(self.piece) + len(self.piece)
        return (text[:first], text[first:last], text[last:]) if first >= 0 else ("", "", "")

    def count(self, size: Size) -> int:
        """Return the number of an image's tokens by the processor's own count; 0 where it counts none."""
        try:
            counted = self.processor._get_num_multimodal_tokens(image_sizes=[size])["num_image_tokens"]
        except Exception:  # the code of any processor runs here
            return 0
        return int(counted[0])

    def write(self, picture: Picture, rules: ImageRules) -> str:
        """Return the text of an image. Raises RowError where the processor does not take the image.

        Raises UserError where the processor writes another text for the image itself.
        """
        size = (picture.height, picture.width)
        try:
            if size not in self.texts:
                self.texts[size] = sys.intern(self.write_size(size))  # kilobytes, for thousands of sizes in some data
            if self.num_compared < NUM_COMPARED:
                self.num_compared += 1
                self.compare(picture.ref, self.texts[size], rules)
        except UserError:
            raise
        except Exception as error:  # the code of any processor runs here
            raise RowError(
                f"has {picture.ref.describe()} of {picture.width} x {picture.height} pixels, which the model's "
                f"{type(self.processor).__name__} does not take ({quote_error(error)}): give it another shape, or "
                "remove the row."
            ) from error
        return self.texts[size]

    def write_size(self, size: Size) -> str:
        """Return the text of any image of a size."""
        num_tokens = 0 if self.frame is None else self.count(size)
        if not num_tokens or self.frame is None:
            return self.write_blank(size)
        begin, end = self.frame
        return begin + self.piece * num_tokens + end

    def write_blank(self, size: Size) -> str:
        """Return the text of a white image of a size."""
        return self.process_blank(self.processor.image_token, [size])

    def process_blank(self, text: str, sizes: Sequence[Size]) -> str:
        """Return what the processor makes of a text with placeholders and white images of these sizes."""
        return self.process(text, [blank(size) for size in sizes], **COARSE)

    def process(self, text: str, images: list[Image.Image], **options: Any) -> str:
        """Return what the processor makes of a text with placeholders and their images."""
        return process_images(self.processor, [text], [images], **options)[1].plain_texts[0]

    def compare(self, ref: ImageRef, text: str, rules: ImageRules) -> None:
        """Raise UserError where the processor writes another text for an image than it writes for its size."""
        if self.process(self.processor.image_token, [open_image(ref, rules)]) != text:
            self.refuse(f"makes other tokens of {ref.describe()} than of a white image of the same size")

    def expand(
        self, text: str, spans: list[Span] | None, pictures: tuple[Picture, ...], rules: ImageRules
    ) -> tuple[str, list[Span] | None]:
        """Return a text with each placeholder replaced by its image's text, and the spans at their new places.

        Raises RowError where the text has not one placeholder for each image, or an image is not taken.
        """
        found = [match.span() for match in self.pattern.finditer(text)]
        if len(found) != len(pictures):
            raise RowError(describe_places(len(pictures), len(found), self.processor.image_token))
        written = [self.write(picture, rules) for picture in pictures]
        if self.is_joined:
            written = self.write_together(self.pattern.split(text), pictures)
        pieces, edges, last = [], [(0, 0)], 0  # an edge: a place in the old text, and what the text before it grew by
        for (start, end), new in zip(found, written, strict=True):
            pieces += [text[last:start], new]
            edges.append((end, edges[-1][1] + len(new) - (end - start)))
            last = end

        def move(place: int) -> int:
            return place + next(grown for edge, grown in reversed(edges) if edge <= place)

        moved = spans and [(move(start), move(end)) for start, end in spans]
        return "".join([*pieces, text[last:]]), moved

    def write_together(self, pieces: list[str], pictures: tuple[Picture, ...]) -> list[str]:
        """Return the texts of images that stand between pieces of a text. Raises RowError where they change these."""
        sizes = list_sizes(pictures)
        if sizes not in self.numbers:
            apart = self.process_blank(IMAGE_MARK.join([self.processor.image_token] * len(sizes)), sizes)
            self.numbers[sizes] = [text.count(self.piece) for text in apart.split(IMAGE_MARK)]
        whole = self.process_blank(self.processor.image_token.join(pieces), sizes)
        piece, (first, *others) = re.escape(self.piece), map(re.escape, pieces)
        ends = [*others[:-1], others[-1] + r"\Z"]
        between = zip(self.numbers[sizes], ends, strict=True)
        # Each group is atomic: what it has found is not looked for again where a later one finds nothing.
        pattern = "".join(f"(?>((?:.*?{piece}){{{number}}}.*?){end})" for number, end in between)
        found = re.match(first + pattern, whole, re.DOTALL)
        if found is None:
            raise RowError("has images whose processor changes the text beside them: put a space around each.")
        return list(found.groups())

    def tokenize(self, text: str) -> Ids:
        """Return a text's tokens."""
        return np.array(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)

    def find_tokens(self, picture: Picture) -> Ids:
        """Return the tokens of an image, without texts around them that may join others, such as line breaks."""
        text = self.texts[picture.height, picture.width]
        if text not in self.tokens:
            ids = self.tokenize(text)
            places = np.flatnonzero(np.isin(ids, list(self.processor.tokenizer.added_tokens_decoder)))
            self.tokens[text] = ids[places[0] : places[-1] + 1]
        return self.tokens[text]

    def locate(self, input_ids: Ids, pictures: tuple[Picture, ...]) -> list[Span]:
        """Return the first token and the one after the last of each image. Raises RowError where one is not found."""
        spans = list(self.locate_joined(input_ids, pictures) if self.is_joined else self.search(input_ids, pictures))
        if len(spans) < len(pictures):
            raise RowError("has an image whose tokens join those of its text: put a space around it.")
        return spans

    def search(self, input_ids: Ids, pictures: tuple[Picture, ...]) -> Iterator[Span]:
        """Yield the places of images by the tokens of each, up to the first that is not found."""
        begin = 0
        for tokens in map(self.find_tokens, pictures):
            begin = find_part(input_ids, tokens, begin)
            if begin < 0:
                return
            yield begin, begin + len(tokens)
            begin += len(tokens)

    def locate_joined(self, input_ids: Ids, pictures: tuple[Picture, ...]) -> Iterator[Span]:
        """Yield the places of images by the numbers of their tokens; none where there are other tokens of images."""
        places = np.flatnonzero(np.isin(input_ids, self.image_tokens))
        edges = np.cumsum([0, *self.numbers[list_sizes(pictures)]])
        if edges[-1] == len(places):
            for first, last in pairwise(edges):
                yield int(places[first]), int(places[last - 1]) + 1


def describe_places(num_images: int, num_places: int, token: str) -> str:
    """Return why a text has other than one place for each image, and the fix."""
    fix = f"take the text {token} out of its messages"
    if num_places < num_images:
        fix = "give a chat_template_path whose template writes each"
    return f"has {num_images} images, and the model's chat template writes {num_places} places for them: {fix}."


def list_sizes(pictures: tuple[Picture, ...]) -> tuple[Size, ...]:
    """Return the size of each image."""
    return tuple((one.height, one.width) for one in pictures)


def blank(size: Size) -> Image.Image:
    """Return a white image of a size."""
    height, width = size
    return Image.new("RGB", (width, height), "white")


def find_part(ids: Ids, part: Ids, begin: int) -> int:
    """Return where a part first stands in ids [length] from a place on; -1 where it does not."""
    for place in begin + np.flatnonzero(ids[begin : len(ids) - len(part) + 1] == part[0]):
        if np.array_equal(ids[place : place + len(part)], part):
            return int(place)
    return -1
