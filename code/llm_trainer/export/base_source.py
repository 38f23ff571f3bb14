# SPDX-License-Identifier: Apache-2.0
"""The base of a result, as others find it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BaseSource:
    """The base model's place on the Hugging Face Hub."""

    hub_id: str | None  # None for a folder, whose name on the Hub is not known
    revision: str | None  # the commit that was trained on, where it is known, else the one that was asked for
    sees_images: bool = False
