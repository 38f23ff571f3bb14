# SPDX-License-Identifier: Apache-2.0
"""Images of the report, which stand within the page: what is shown of them, and what they take of it."""

from collections.abc import Iterator
from typing import Any

from llm_trainer.readers.thumbnails import MAX_A_ROW, describe_image, is_thumbnail

MAX_BYTES = 2**20  # of all thumbnails of a page


class Thumbnails:
    """The room of a page for thumbnails. What no longer has room is described in words alone."""

    def __init__(self) -> None:
        self.bytes_left = MAX_BYTES

    def describe(self, images: Any) -> list[dict[str, str]]:
        """Return words for each image of a journal's record, and the thumbnails of the first."""
        found = images if isinstance(images, list) else []
        return list(self.describe_each([image for image in found if isinstance(image, dict)]))

    def describe_each(self, images: list[dict[str, Any]]) -> Iterator[dict[str, str]]:
        """Yield words for each image, and a thumbnail where it is one and has room."""
        for number, image in enumerate(images):
            uri = image.get("thumbnail")
            has_room = number < MAX_A_ROW and is_thumbnail(uri) and len(str(uri)) <= self.bytes_left
            self.bytes_left -= len(str(uri)) if has_room else 0
            yield {"words": describe_image(image), "thumbnail": str(uri) if has_room else ""}
