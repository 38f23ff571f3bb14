# SPDX-License-Identifier: Apache-2.0
"""The model's own processor of images, and the text that it writes in place of an image's placeholder.

The text depends on the size of an image alone. It is counted where the processor tells its tokens by the size. Else
the processor is run once for each size, on a white image. The first images are processed themselves, to compare.
"""

import hashlib
import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoProcessor
from transformers.processing_utils import ProcessorMixin

from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.data.formats.examples import RowError
from llm_trainer.data.formats.pictures import IMAGE_MARK
from llm_trainer.data.labels import Ids
from llm_trainer.readers.images import ImageRef, ImageRules, Picture, open_image

Size = tuple[int, int]  # height and width in pixels
Span = tuple[int, int]

FILES = ("*processor_config.json", "*.jinja", "chat_template.json")
LOADING_ERRORS = (OSError, ValueError, TypeError, ImportError, AttributeError, LookupError, RuntimeError)
# Sizes that tell whether an image is a number of equal tokens: large ones, of both shapes, and no square alone.
PROBE_SIZES: tuple[Size, ...] = ((336, 1344), (1344, 336), (700, 930), (64, 96))
NUM_COMPARED = 3  # images of a process that are processed themselves, to compare


@dataclass(frozen=True)
class ImageProcessing:
    """The processor of a model that takes images. It is loaded when the first image comes."""

    folder: str
    image_token_id: int | None = None
    trust_remote_code: bool = False

    @cached_property
    def fingerprint(self) -> str:
        """The digest of the files that decide which tokens an image becomes."""
        files = sorted({file for pattern in FILES for file in Path(self.folder).glob(pattern)})
        digest = hashlib.sha256()
        for file in files:
            digest.update(f"{file.name}\0".encode() + file.read_bytes())
        return digest.hexdigest()

    @cached_property
    def processor(self) -> Any:
        """The processor. Raises UserError where the model's folder has none that can be loaded."""
        return load_processor(self.folder, self.trust_remote_code)

    @cached_property
    def placeholders(self) -> "Placeholders":
        """The texts of images. Raises UserError as `processor` does, and where the processor tells no texts."""
        return Placeholders(self.processor)


def load_processor(folder: str, trust_remote_code: bool = False) -> Any:
    """Return the processor of a model's folder. Raises UserError where there is none that takes images."""
    fix = "put the model's own preprocessor_config.json and processor_config.json there, or remove the images."
    if not any(Path(folder).glob(FILES[0])):
        raise UserError(f"The data has images and {folder} has no processor for them: {fix}")
    try:
        with without_videos():
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except LOADING_ERRORS as error:
        raise UserError(
            f"The data has images and the processor of {folder} could not be loaded ({quote_error(error)}): {fix}"
        ) from error
    if not hasattr(processor, "image_processor") or getattr(processor, "image_token", None) is None:
        raise UserError(
            f"The data has images and {folder} has a {type(processor).__name__}, which writes no token for an image: "
            "give a model whose processor does, or remove the images."
        )
    return processor


@contextmanager
def without_videos() -> Iterator[None]:
    """Have processors load without the part for videos, which needs torchvision, where that is not installed."""
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    own = ProcessorMixin.__dict__["get_attributes"]

    def list_others(cls: Any) -> list[str]:
        return [name for name in own.__func__(cls) if "video" not in name]

    ProcessorMixin.get_attributes = classmethod(list_others)
    try:
        yield
    finally:
        ProcessorMixin.get_attributes = own


def process_images(processor: Any, images: list[list[Any]], **options: Any) -> Any:
    """Return what the processor makes of rows of images, and of a text of one placeholder for each."""
    texts = [processor.image_token * len(row) for row in images]
    return processor(images=images, text=texts, add_special_tokens=False, **options)


@dataclass(eq=False)
class Placeholders:
    """The text, and its tokens, that a processor writes in place of an image's placeholder."""

    processor: Any
    texts: dict[Size, str] = field(default_factory=dict)
    tokens: dict[str, Ids] = field(default_factory=dict)
    num_compared: int = 0

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """The placeholder of an image: the processor's, or the mark that a template has left as it is."""
        return re.compile(f"{re.escape(self.processor.image_token)}|{IMAGE_MARK}")

    @cached_property
    def frame(self) -> tuple[str, str] | None:
        """The texts around the image tokens, where an image is a number of equal tokens; None where it is not."""
        found = set()
        for size in PROBE_SIZES:
            begin, tokens, end = self.split(self.write_blank(size))
            if tokens != self.processor.image_token * self.count(size) or not tokens:
                return None
            found.add((begin, end))
        return found.pop() if len(found) == 1 else None

    def split(self, text: str) -> tuple[str, str, str]:
        """Return a text's part before its first image token, up to its last one, and after it."""
        token = self.processor.image_token
        first, last = text.find(token), text.rfind(token) + len(token)
        return (text[:first], text[first:last], text[last:]) if first >= 0 else ("", "", "")

    def count(self, size: Size) -> int:
        """Return the number of an image's tokens by the processor's own count; 0 where it counts none."""
        try:
            counted = self.processor._get_num_multimodal_tokens(image_sizes=[size])["num_image_tokens"]
        except (AttributeError, NotImplementedError, TypeError, LookupError, ValueError):
            return 0
        return int(counted[0])

    def write(self, picture: Picture, rules: ImageRules) -> str:
        """Return the text of an image. Raises UserError where the processor writes another for the image itself."""
        size = (picture.height, picture.width)
        if size not in self.texts:
            if self.frame is None:
                self.texts[size] = self.write_blank(size)
            else:
                begin, end = self.frame
                self.texts[size] = begin + self.processor.image_token * self.count(size) + end
        if self.num_compared < NUM_COMPARED:
            self.num_compared += 1
            self.compare(picture.ref, self.texts[size], rules)
        return self.texts[size]

    def write_blank(self, size: Size) -> str:
        """Return the text of a white image of a size."""
        height, width = size
        return self.process(Image.new("RGB", (width, height), "white"))

    def process(self, image: Image.Image) -> str:
        """Return the text that the processor writes for an image. Raises UserError where it does not tell it."""
        try:
            made = process_images(self.processor, [[image]], return_text_replacement_offsets=True)
            return str(made["text_replacement_offsets"][0][0]["replacement"])
        except (LookupError, TypeError, NotImplementedError, AttributeError) as error:
            raise UserError(
                f"The model's {type(self.processor).__name__} does not tell which tokens an image becomes "
                f"({quote_error(error)}): rows with images cannot be trained on with this model; remove the images."
            ) from error

    def compare(self, ref: ImageRef, text: str, rules: ImageRules) -> None:
        """Raise UserError where the processor writes another text for an image than it writes for its size."""
        if self.process(open_image(ref, rules)) != text:
            raise UserError(
                f"The model's {type(self.processor).__name__} makes other tokens of {ref.describe()} than of a white "
                "image of the same size: rows with images cannot be trained on with this model; remove the images."
            )

    def expand(
        self, text: str, spans: list[Span] | None, pictures: tuple[Picture, ...], rules: ImageRules
    ) -> tuple[str, list[Span] | None]:
        """Return a text with each placeholder replaced by its image's text, and the spans at their new places.

        Raises RowError where the text has not one placeholder for each image.
        """
        found = [match.span() for match in self.pattern.finditer(text)]
        if len(found) != len(pictures):
            raise RowError(
                f"has {len(pictures)} images, and the model's chat template writes {len(found)} places for them: take "
                f"the text {self.processor.image_token} out of its messages, or give another chat_template_path."
            )
        pieces, edges, last = [], [(0, 0)], 0  # an edge: a place in the old text, and what the text before it grew by
        for (start, end), picture in zip(found, pictures, strict=True):
            new = self.write(picture, rules)
            pieces += [text[last:start], new]
            edges.append((end, edges[-1][1] + len(new) - (end - start)))
            last = end

        def move(place: int) -> int:
            return place + next(grown for edge, grown in reversed(edges) if edge <= place)

        moved = spans and [(move(start), move(end)) for start, end in spans]
        return "".join([*pieces, text[last:]]), moved

    def find_tokens(self, picture: Picture) -> Ids:
        """Return the tokens of an image, without texts around them that may join others, such as line breaks."""
        text = self.texts[picture.height, picture.width]
        if text not in self.tokens:
            tokenizer = self.processor.tokenizer
            ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
            special = np.flatnonzero(np.isin(ids, list(tokenizer.added_tokens_decoder)))
            self.tokens[text] = ids[special[0] : special[-1] + 1] if len(special) else ids
        return self.tokens[text]

    def locate(self, input_ids: Ids, pictures: tuple[Picture, ...]) -> list[Span]:
        """Return the first token and the one after the last of each image. Raises RowError where one is not found."""
        spans, begin = [], 0
        for picture in pictures:
            tokens = self.find_tokens(picture)
            begin = find_part(input_ids, tokens, begin)
            if begin < 0:
                raise RowError("has an image whose tokens join those of its text: put a space around it.")
            spans.append((begin, begin + len(tokens)))
            begin += len(tokens)
        return spans


def find_part(ids: Ids, part: Ids, begin: int) -> int:
    """Return where a part first stands in ids [length] from a place on; -1 where it does not."""
    for place in begin + np.flatnonzero(ids[begin : len(ids) - len(part) + 1] == part[0]):
        if np.array_equal(ids[place : place + len(part)], part):
            return int(place)
    return -1
