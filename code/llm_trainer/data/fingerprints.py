# SPDX-License-Identifier: Apache-2.0
"""The journal's record of a split: which data these were, by digests, and how their rows are long."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from llm_trainer.data.report import DataReport
from llm_trainer.readers.sources import FileSource, Source

MAX_LENGTHS = 200  # different ones in a record: as many bars as a histogram shows at most
DIGEST_CHARACTERS = 36  # that MLflow takes of a data set's digest


def describe_split(split: str, report: DataReport, sources: Sequence[Source]) -> dict[str, Any]:
    """The fields of a `data` record."""
    places = find_places(sources)
    return {
        "split": split,
        "rows": report.num_rows,
        "tokens": report.num_tokens,
        "supervised_tokens": report.num_supervised_tokens,
        "lengths": bin_lengths(report.lengths),
        "sources": [{**file, "uri": places.get(file["name"])} for file in report.files],
        "digest": digest(report.files),
        "summary": report.summary(),
    }


def find_places(sources: Sequence[Source]) -> dict[str, str]:
    """The name of each file, or of a split of a Hub data set, as reports have it -> its URI."""
    places: dict[str, str] = {}
    for source in sources:
        if isinstance(source, FileSource):
            places |= {name: file.absolute().as_uri() for name, file in source.named()}
        else:
            places[source.title] = f"hf://datasets/{source.name}"
    return places


def digest(files: Sequence[Mapping[str, Any]]) -> str:
    """One for all files, by their own digests, or where a stream has none by name, size and time; in any order."""
    contents = sorted(file.get("sha256") or json.dumps(file, sort_keys=True) for file in files)
    return hashlib.sha256("\n".join(contents).encode()).hexdigest()[:DIGEST_CHARACTERS]


def bin_lengths(lengths: Mapping[int, int]) -> dict[int, int]:
    """Tokens -> rows of that length, or where there are many lengths, of at most so many and more than the next less.

    The bins are equally wide, and the last ends at the longest row.
    """
    longest = max(lengths, default=0)
    width = 1 if len(lengths) <= MAX_LENGTHS else math.ceil(longest / MAX_LENGTHS)
    bins: dict[int, int] = {}
    for length, rows in sorted(lengths.items()):
        end = min(longest, math.ceil(length / width) * width)
        bins[end] = bins.get(end, 0) + rows
    return bins
