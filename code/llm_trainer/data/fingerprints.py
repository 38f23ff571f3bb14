# SPDX-License-Identifier: Apache-2.0
"""Fingerprint of a split for the journal: its files by their digests, and the lengths of its rows."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_trainer.data.report import DataReport
from llm_trainer.data.token_cache import list_images
from llm_trainer.readers.sources import FileSource, Source

MAX_LENGTHS = 200  # different lengths in a record: the most bars that a histogram shows
DIGEST_CHARACTERS = 36  # the most that MLflow takes for a data set's digest


def describe_split(split: str, report: DataReport, sources: Sequence[Source]) -> dict[str, Any]:
    """Return the fields of a split's `data` record."""
    places, images = find_places(sources), describe_images(sources) if report.num_images else []
    return {
        "split": split,
        "rows": report.num_rows,
        "tokens": report.num_tokens,
        "supervised_tokens": report.num_supervised_tokens,
        "lengths": bin_lengths(report.lengths),
        "sequences_a_row": report.sequences_a_row,
        "sources": [{**file, "uri": places.get(file["name"])} for file in report.files],
        "digest": combine_digests([*report.files, *images]),
        "summary": report.summary(),
    }


def find_places(sources: Sequence[Source]) -> dict[str, str]:
    """Return the URI of each file, or of a split of a Hub data set, by its name in reports."""
    places: dict[str, str] = {}
    for source in sources:
        if isinstance(source, FileSource):
            places |= {name: file.absolute().as_uri() for name, file in source.name_files()}
        else:
            places[source.title] = f"hf://datasets/{source.name}"
    return places


def describe_images(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """Return name and size in bytes of each file beside the rows that may be an image of theirs."""
    found = (image for source in sources for image in list_images(source) if "image" in image)
    return [{"image": Path(image["image"]).name, "bytes": image["bytes"]} for image in found]


def combine_digests(files: Sequence[Mapping[str, Any]]) -> str:
    """Return one digest for all files, whatever their order.

    It comes from their own digests, from name, size and time where a stream has none, or from name and size of images.
    """
    contents = sorted(file.get("sha256") or json.dumps(file, sort_keys=True) for file in files)
    return hashlib.sha256("\n".join(contents).encode()).hexdigest()[:DIGEST_CHARACTERS]


def bin_lengths(lengths: Mapping[int, int]) -> dict[int, int]:
    """Return the number of sequences by length in tokens, in at most MAX_LENGTHS bins.

    Each bin is named by its largest length. The bins are equally wide, and the last ends at the longest row.
    """
    longest = max(lengths, default=0)
    width = 1 if len(lengths) <= MAX_LENGTHS else math.ceil(longest / MAX_LENGTHS)
    bins: dict[int, int] = {}
    for length, rows in sorted(lengths.items()):
        end = min(longest, math.ceil(length / width) * width)
        bins[end] = bins.get(end, 0) + rows
    return bins
