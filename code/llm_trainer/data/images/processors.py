# SPDX-License-Identifier: Apache-2.0
"""The processor of a model's images: loaded from the model's folder, and run beside its tokenizer."""

import copy
import difflib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoProcessor, BatchEncoding
from transformers.image_processing_backends import PilBackend
from transformers.processing_utils import ProcessorMixin

from llm_trainer.common.errors import UserError, quote_error

FILES = ("*processor_config.json", "*.jinja", "chat_template.json")
LOADING_ERRORS = (OSError, ValueError, TypeError, ImportError, AttributeError, LookupError, RuntimeError)
TORCHVISION = "torchvision"
TRIED_SIZE = (640, 480)  # pixels of a picture that options are tried on
rescale = PilBackend.rescale


def load_processor(folder: str, trust_remote_code: bool, options: Mapping[str, Any]) -> Any:
    """Return the processor of a model's folder, with other options of its part for images.

    Raises UserError where there is none that takes images, or no such option.
    """
    fix = "put the model's own preprocessor_config.json and processor_config.json there, or remove the images."
    if not any(Path(folder).glob(FILES[0])):
        raise UserError(f"The data has images and {folder} has no processor for them: {fix}")
    try:
        with without_videos():
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except LOADING_ERRORS as error:
        if TORCHVISION in str(error).lower() and not has_torchvision():
            raise UserError(
                f"The data has images and the processor of {folder} needs torchvision, which is not installed: install "
                "it, or remove the images."
            ) from error
        raise UserError(
            f"The data has images and the processor of {folder} could not be loaded ({quote_error(error)}): {fix}"
        ) from error
    if not hasattr(processor, "image_processor") or getattr(processor, "image_token", None) is None:
        raise UserError(
            f"The data has images and {folder} has a {type(processor).__name__}, which writes no token for an image: "
            "give a model whose processor does, or remove the images."
        )
    if options:
        processor.image_processor = change_options(processor, options)
    lay_out_by_channel()
    return processor


def change_options(processor: Any, options: Mapping[str, Any]) -> Any:
    """Return a processor's part for images with other options. Raises UserError for those that it does not take."""
    images = processor.image_processor
    kind = type(images)
    for name in options:
        refuse_option(name, processor)
    try:
        changed = kind.from_dict({**images.to_dict(), **options})
        changed(Image.new("RGB", TRIED_SIZE), return_tensors="pt")
        return changed
    except Exception as error:  # the code of any processor runs here
        raise UserError(
            f"image_processor_options={dict(options)!r} is refused by the model's {kind.__name__} "
            f"({quote_error(error)}): give values as its preprocessor_config.json has them."
        ) from error


def refuse_option(name: str, processor: Any) -> None:
    """Raise UserError for an option that a processor's part for images does not know, or never reads."""
    images = processor.image_processor
    known = images.valid_kwargs.__annotations__
    if name not in known:
        (nearest,) = difflib.get_close_matches(name, known, n=1, cutoff=0)
        raise UserError(
            f"image_processor_options has {name!r}, which the model's {type(images).__name__} does not take: the "
            f"nearest that it takes is {nearest!r}."
        )
    if name in getattr(processor, "images_kwargs", ()):
        raise UserError(
            f"image_processor_options has {name!r}, which the model's {type(processor).__name__} itself sets for every "
            "image: leave it out."
        )


def lay_out_by_channel() -> None:
    """Have processors with Pillow compute on pixels that lie by channel in memory.

    Pillow's lie by pixel. To normalize these takes NumPy six times as long, for the same numbers.
    """
    PilBackend.rescale = rescale_by_channel


def rescale_by_channel(processor: Any, image: np.ndarray[Any, Any], scale: float, **options: Any) -> Any:
    """Return an image [channels, height, width] as Transformers rescales it, laid out by channel."""
    return rescale(processor, np.ascontiguousarray(image), scale, **options)


def has_torchvision() -> bool:
    """Tell whether torchvision is installed."""
    return importlib.util.find_spec(TORCHVISION) is not None


@contextmanager
def without_videos() -> Iterator[None]:
    """Have processors load without the part for videos, which needs torchvision, where that is not installed."""
    if has_torchvision():
        yield
        return
    names, load = (ProcessorMixin.__dict__[name] for name in ("get_attributes", "_get_arguments_from_pretrained"))

    def list_others(cls: Any) -> list[str]:
        return [name for name in names.__func__(cls) if "video" not in name]

    def load_others(cls: Any, *places: Any, **options: Any) -> list[Any]:
        parts = iter(load.__func__(cls, *places, **options))
        return [None if "video" in name else next(parts) for name in names.__func__(cls)]

    ProcessorMixin.get_attributes = classmethod(list_others)
    ProcessorMixin._get_arguments_from_pretrained = classmethod(load_others)
    try:
        yield
    finally:
        ProcessorMixin.get_attributes, ProcessorMixin._get_arguments_from_pretrained = names, load


class TokenizerStandIn:
    """A processor's tokenizer that keeps the texts that the processor gives it.

    It may answer with tokens of its own. Then the processor derives from these what depends on tokens.
    """

    def __init__(self, tokenizer: Any, tokens: dict[str, Any] | None = None) -> None:
        """Take the true tokenizer, and the tensors [rows, slots] to answer with."""
        self.tokenizer, self.tokens = tokenizer, tokens
        self.begin = tokenizer.bos_token or ""  # of any text, as some processors write it where it is missing
        self.texts: list[str] = []
        self.ids: list[list[int]] = []  # of the texts, not padded

    def __call__(self, text: list[str], **options: Any) -> Any:
        """Keep the texts with their ids, and return tokens."""
        self.texts = list(text)
        own = self.tokenizer(self.texts, add_special_tokens=False)
        self.ids = own["input_ids"]
        if self.tokens is None:
            return self.tokenizer(text, **options)
        has_tensors = options.get("return_tensors") is not None
        given = {name: value if has_tensors else value.tolist() for name, value in self.tokens.items()}
        return BatchEncoding(given, own.encodings)  # which tell which characters a token has

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["tokenizer"], name)

    @property
    def plain_texts(self) -> list[str]:
        """The texts without their beginning."""
        return [text.removeprefix(self.begin) for text in self.texts]


def process_images(
    processor: Any, texts: list[str], images: list[list[Any]], tokens: dict[str, Any] | None = None, **others: Any
) -> tuple[Any, TokenizerStandIn]:
    """Return what a processor makes of texts with placeholders and their images, and what keeps the texts it writes.

    `tokens` stand in the result in place of the texts' own. `others` are options for this call alone.
    """
    own = copy.copy(processor)
    own.tokenizer = written = TokenizerStandIn(processor.tokenizer, tokens)
    options = {"padding": True, "padding_side": "right", "return_tensors": "pt", "add_special_tokens": False}
    made = own(images=images, text=[written.begin + text for text in texts], **options, **others)
    return made, written
