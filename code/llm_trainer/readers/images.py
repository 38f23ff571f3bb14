# SPDX-License-Identifier: Apache-2.0
"""Images of rows: where their bytes are, and what they show, opened within bounds.

A row names an image by a file, or brings its bytes. Nothing outside of the channel is read, and no address is asked
unless the settings allow it. What is opened is one of a few formats, and small enough by its header.
"""

import base64
import binascii
import io
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import Image, UnidentifiedImageError

from llm_trainer.common.errors import cut_quote, quote_error
from llm_trainer.common.redaction import hide_queries
from llm_trainer.config.sections import DataSettings
from llm_trainer.readers.addresses import FetchError, encode_address, fetch
from llm_trainer.readers.rows import FilePart

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # others run programs, or are as good as never met
READABLE = "JPEG, PNG, WebP, GIF, BMP or TIFF"
ORIENTATION = 0x0112  # the tag of Exif
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPS = (5, 6, 7, 8)  # the turns that swap width and height
DATA_URI, ADDRESSES = "data:", ("http://", "https://")
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*:/", re.IGNORECASE)  # of any scheme
MAX_HELD_BYTES = 64 * 2**20  # of an image's encoded bytes that do not stay in a file of their own
SMALL = (64, 64)  # a JPEG is read to its end at the scale that is next to this, in a fraction of the time


class ImageError(ValueError):
    """A reason why an image cannot be used, and how to mend it: the rest of a sentence that begins with its row."""


@dataclass(frozen=True)
class ImageRules:
    """The settings that bound images."""

    max_pixels: int
    allow_remote: bool = False

    @classmethod
    def from_settings(cls, settings: DataSettings) -> "ImageRules":
        """Return the rules of a job."""
        return cls(settings.max_image_pixels, settings.allow_remote_images)


@dataclass(frozen=True)
class ImageRef:
    """The place of an image's encoded bytes: a file or a part of one, or the bytes themselves."""

    path: str = ""  # empty where the bytes are here
    offset: int = 0
    size: int = 0  # of the part; 0: the whole file
    data: bytes = b""
    name: str = ""  # as a row gives it, for messages; empty for bytes

    def open(self) -> IO[bytes]:
        """Return the encoded bytes as a file."""
        if not self.path:
            return io.BytesIO(self.data)
        if not self.size:
            return open(self.path, "rb")
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))

    @property
    def title(self) -> str:
        """The name of the image, for people."""
        return cut_quote(self.name or Path(self.path).name) or "bytes of the row"

    def describe(self) -> str:
        """Return the image's name for a message."""
        return f"the image {self.title}" if self.name or self.path else "an image given by its bytes"


@dataclass(frozen=True)
class Picture:
    """An image that was found and read to its end, with its size in pixels."""

    ref: ImageRef
    height: int
    width: int


@dataclass(frozen=True)
class ImageFolder:
    """The folder that a source's images may not leave."""

    path: Path | None = None  # None for a data set of the Hub
    is_sharded: bool = False  # whether other hosts have other files, so that a row has to bring its images' bytes


@dataclass(frozen=True)
class ImagePlace:
    """The data file that rows come from, and the folder of their images."""

    file: Path | None  # None for rows of the Hub
    folder: ImageFolder


def find_image(value: Any, place: ImagePlace, rules: ImageRules) -> ImageRef:
    """Return where the image is that a row's value gives. Raises ImageError."""
    ref = locate_image(value, place, rules)
    try:
        f"{ref.path}{ref.name}".encode()
    except UnicodeEncodeError as error:
        raise ImageError(f"has {ref.describe()}, whose name is not UTF-8: rename it.") from error
    if ref.size > MAX_HELD_BYTES:
        raise ImageError(describe_length(ref))
    return embed_image(ref) if ref.path and place.folder.is_sharded else ref


def embed_image(ref: ImageRef) -> ImageRef:
    """Return an image of a file with its encoded bytes. Raises ImageError where these are too many, or do not come."""
    with told(ref), ref.open() as file:
        data = file.read(MAX_HELD_BYTES + 1)
    if len(data) > MAX_HELD_BYTES:
        raise ImageError(describe_length(ref))
    return ImageRef(data=data, name=ref.name)


def describe_length(ref: ImageRef) -> str:
    """Return the reason why an image has too many encoded bytes."""
    return f"has {ref.describe()} of more than {MAX_HELD_BYTES // 2**20} MiB: shrink it."


def locate_image(value: Any, place: ImagePlace, rules: ImageRules) -> ImageRef:
    """Return the place on this host of the image that a row's value gives. Raises ImageError."""
    if isinstance(value, FilePart) and not value.size:
        return ImageRef(name=value.name)  # as a part of no bytes is not the whole file
    if isinstance(value, FilePart):
        return ImageRef(str(value.path), value.offset, value.size, name=value.name)
    if isinstance(value, bytes):
        return ImageRef(data=value)
    assert isinstance(value, str)
    if is_data_uri(value):
        return ImageRef(data=decode_uri(value))
    if ADDRESS.match(value):
        address = encode_address(value)
        return ImageRef(data=ask_address(address, rules), name=hide_queries(address))
    return ImageRef(str(find_file(value, place)), name=value)


def is_data_uri(value: str) -> bool:
    """Tell whether a text is a data URI, however its scheme is written."""
    return value[: len(DATA_URI)].lower() == DATA_URI


def decode_uri(uri: str) -> bytes:
    """Return the bytes of a data URI, whatever kind it says that they are. Raises ImageError where it is not base64.

    Either alphabet of base64 is read, in lines, percent-encoded, or without the signs that fill it up.
    """
    head, comma, text = uri.partition(",")
    try:
        if not comma or not head.lower().replace(" ", "").endswith(";base64"):
            raise ValueError("no ;base64, in it")
        code = b"".join(unquote_to_bytes(text).split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
        return base64.b64decode(code + b"=" * (-len(code) % 4), validate=True)
    except (ValueError, binascii.Error) as error:
        raise ImageError(
            f"has an image whose data URI cannot be read ({error}): write data:image/png;base64,... ."
        ) from error


def encode_uri(file: Path) -> str:
    """Return an image file as a data URI, byte for byte. Raises ImageError where it is none that is read."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            kind = Image.MIME["JPEG" if image.format == "MPO" else str(image.format)]  # MPO: with more images behind it
        return f"{DATA_URI}{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
    except Exception as error:  # Pillow's readers raise almost anything
        raise ImageError(f"{cut_quote(str(file))!r} is no {READABLE} file that can be read: give one.") from error


def ask_address(address: str, rules: ImageRules) -> bytes:
    """Return what is at an encoded address. Raises ImageError where it is not to be asked, or nothing comes."""
    quoted = cut_quote(hide_queries(address))
    if not address.lower().startswith(ADDRESSES):
        raise ImageError(
            f"has an image at the address {quoted!r}: put the file beside the data, and give its name relative to the "
            "data file."
        )
    if not rules.allow_remote:
        raise ImageError(
            f"has an image at the address {quoted!r}: put the file beside the data, or set allow_remote_images=true."
        )
    try:
        return fetch(address, MAX_HELD_BYTES)
    except FetchError as error:
        raise ImageError(f"has an image at {quoted!r}, which {error}: put the file beside the data.") from error


def find_file(name: str, place: ImagePlace) -> Path:
    """Return the file that a row names. Raises ImageError where it is outside of the channel, or is not there."""
    quoted = cut_quote(name)
    folder = place.folder.path
    if place.file is None or folder is None:
        raise ImageError(f"names the image file {quoted!r}, and a Hub data set has no files beside it: give bytes.")
    path = PurePosixPath(name)
    if not name.strip() or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ImageError(
            f"names the image file {quoted!r}: give a name relative to the data file, within its channel and without "
            "'..'."
        )
    file = place.file.parent / path
    try:
        target = file.resolve(strict=True)
        is_file = stat.S_ISREG(target.stat().st_mode)
    except (OSError, RuntimeError) as error:
        spread = " on this host, as its channel's files are spread over the hosts: give bytes or tar shards"
        reason = spread if place.folder.is_sharded else f": put it beside {place.file.name}, or mend the name"
        raise ImageError(f"names the image file {quoted!r}, which is not there{reason}.") from error
    if not target.is_relative_to(folder.resolve()):
        raise ImageError(f"names the image file {quoted!r}, a link out of its channel: give the file itself.")
    if not is_file:
        raise ImageError(f"names the image file {quoted!r}, which is no regular file: give a file.")
    return target


def inspect_image(ref: ImageRef, rules: ImageRules) -> tuple[int, int]:
    """Return an image's height and width, after it was read to its end. Raises ImageError as `open_image` does."""
    with opened(ref, rules) as image:
        width, height = image.size
        image.draft("RGB", SMALL)  # of a JPEG alone
        image.load()
        return (width, height) if find_turn(image) in SWAPS else (height, width)


def open_image(ref: ImageRef, rules: ImageRules) -> Image.Image:
    """Return an image as RGB with 8 bit a colour: upright, its first frame, on white where it is transparent.

    Raises ImageError where it is missing, damaged, of another kind, or has more pixels than the rules allow.
    """
    with opened(ref, rules) as image:
        image.load()
        turn = TURNS.get(find_turn(image))
        return convert_to_rgb(image if turn is None else image.transpose(turn))


def find_turn(image: Image.Image) -> int:
    """Return how a loaded image is turned by its Exif data. None that can be read say that it is upright."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # Pillow's readers raise almost anything
        return 1


@contextmanager
def opened(ref: ImageRef, rules: ImageRules) -> Iterator[Image.Image]:
    """Open an image by its header. Raises ImageError, also for what fails within the block."""
    with told(ref), warnings.catch_warnings(), ref.open() as file:
        warnings.simplefilter("ignore")  # of bombs, which are refused below, and of odd metadata
        try:
            image = Image.open(file, formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise ImageError(describe_excess(ref, "hundreds of millions of pixels", rules)) from error
        if image.width * image.height > rules.max_pixels:
            raise ImageError(describe_excess(ref, f"{image.width} x {image.height} pixels", rules))
        if image.mode == "F":  # no file tells their white
            raise ImageError(f"has {ref.describe()}, whose pixels are fractions: write it with 8 or 16 bit a colour.")
        yield image


@contextmanager
def told(ref: ImageRef) -> Iterator[None]:
    """Raise ImageError for whatever fails within the block, where an image is read."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"has {ref.describe()}, which is no {READABLE} file: convert or remove it.") from error
    except Exception as error:  # Pillow's readers raise almost anything for a file that is damaged, or made to harm
        if isinstance(error, OSError) and error.errno is not None:
            raise ImageError(
                f"has {ref.describe()}, which cannot be read ({os.strerror(error.errno)}): check that it is there and "
                "readable."
            ) from error
        raise ImageError(
            f"has {ref.describe()}, which is damaged or cut off ({quote_error(error)}): write it again, or remove the "
            "row."
        ) from error


def describe_excess(ref: ImageRef, found: str, rules: ImageRules) -> str:
    """Return the reason why an image is too large."""
    return (
        f"has {ref.describe()} with {found} and max_image_pixels={rules.max_pixels}: shrink it, or raise "
        "max_image_pixels."
    )


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode as RGB, on white where it is transparent."""
    if image.mode.startswith("I"):
        image = reduce_depth(image)
    if image.has_transparency_data:
        image, seen = Image.new("RGB", image.size, "white"), image.convert("RGBA")
        image.paste(seen, mask=seen)
    return image.convert("RGB")


def reduce_depth(image: Image.Image) -> Image.Image:
    """Return an image of 16 bit, which Pillow may hold in 32, with the upper 8 of them, on white."""
    values = np.asarray(image)
    upper = (values.clip(0, 2**16 - 1) >> 8).astype(np.uint8)
    upper[values == image.info.get("transparency", -1)] = 2**8 - 1
    return Image.fromarray(upper, "L")
