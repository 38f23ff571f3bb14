# SPDX-License-Identifier: Apache-2.0
"""Images as a person is shown them: words for each, and thumbnails, which are data URIs of small JPEG files."""

import base64
import binascii
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from llm_trainer.readers.images import ImageError, ImageRef, ImageRules, open_image

MAX_SIDE = 160  # pixels
QUALITY = 75
MAX_CHARACTERS = 48 * 1024  # of the data URI; noise of MAX_SIDE, which compresses worst, needs fewer
MAX_A_ROW = 4  # images of a row that are shown
MAX_A_JOB = 32  # thumbnails of sample prompts
PREFIX = "data:image/jpeg;base64,"
BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")


def describe_image(image: Mapping[str, Any]) -> str:
    """Return name, size and tokens of an image of a journal's record, as far as these are known."""
    parts = [str(image.get("name") or "an image")]
    if image.get("width") and image.get("height"):
        parts.append(f"{image['width']} x {image['height']} pixels")
    if image.get("tokens"):
        parts.append(f"{image['tokens']} tokens from token {image.get('start', 0)} on")
    return ", ".join(parts)


def write_thumbnail(image: Image.Image) -> str:
    """Return an RGB image as the data URI of a JPEG with at most MAX_SIDE pixels a side and MAX_CHARACTERS."""
    small = image.copy()
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=QUALITY)
    return PREFIX + base64.b64encode(file.getvalue()).decode()


def is_thumbnail(uri: object) -> bool:
    """Tell whether a value is a data URI as `write_thumbnail` makes it, and no address or markup."""
    return (
        isinstance(uri, str)
        and len(uri) <= MAX_CHARACTERS
        and uri.startswith(PREFIX)
        and BASE64.fullmatch(uri, len(PREFIX)) is not None
    )


def read_thumbnail(uri: object) -> Image.Image | None:
    """Return a thumbnail's pixels, None where the value is no thumbnail."""
    if not is_thumbnail(uri):
        return None
    try:
        image = open_image(ImageRef(data=base64.b64decode(str(uri)[len(PREFIX) :])), ImageRules(MAX_SIDE**2))
    except (ImageError, binascii.Error):
        return None
    return image if max(image.size) <= MAX_SIDE else None


def join_images(images: Sequence[Image.Image]) -> Image.Image:
    """Return images side by side, on white. Of none it is a white one."""
    size = sum(image.width for image in images), max((image.height for image in images), default=0)
    sheet = Image.new("RGB", size if images else (MAX_SIDE // 4, MAX_SIDE // 4), "white")
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width
    return sheet
