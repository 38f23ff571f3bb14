# SPDX-License-Identifier: Apache-2.0
"""What the journal holds of a split: places, one digest for all files, and lengths in few bins."""

from collections import Counter

import pytest

from llm_trainer.data.fingerprints import MAX_LENGTHS, bin_lengths, combine_digests, describe_split
from llm_trainer.data.report import DataReport
from llm_trainer.readers.sources import FileSource, HubSource

A, B = {"name": "a.jsonl", "bytes": 3, "sha256": "11"}, {"name": "b.jsonl", "bytes": 3, "sha256": "22"}


def test_the_digest_depends_on_contents_alone():
    assert combine_digests([A, B]) == combine_digests([{**B, "name": "moved/b.jsonl"}, A])
    assert combine_digests([A, B]) != combine_digests([A, {**B, "sha256": "23"}])
    assert combine_digests([A]) != combine_digests([A, A])
    assert 0 < len(combine_digests([A])) <= 36
    streamed = {"name": "a.jsonl", "bytes": 3, "modified": 7, "audited_rows": 1000}
    assert combine_digests([streamed]) != combine_digests([{**streamed, "modified": 8}])


def test_the_digest_tells_another_image_beside_the_rows(tmp_path):
    image = tmp_path / "a.png"
    sources = [FileSource("train", tmp_path, (), passed_over={image: "an image"})]
    reports = DataReport(files=[A], num_rows=1), DataReport(files=[A], num_rows=1, num_images=1)
    found = []
    for content in (b"one", b"two three"):
        image.write_bytes(content)
        found.append([describe_split("train", report, sources)["digest"] for report in reports])
    (text, first), (same_text, second) = found
    assert text == same_text == combine_digests([A]) and len({text, first, second}) == 3


def test_few_lengths_stay_as_they_are():
    assert bin_lengths({7: 1, 3: 2}) == {3: 2, 7: 1}
    assert bin_lengths({}) == {}


@pytest.mark.parametrize("longest", [201, 1234, 100_000])
def test_many_lengths_share_bins_up_to_the_longest(longest):
    lengths = Counter(dict.fromkeys(range(1, longest + 1), 1))
    bins = bin_lengths(lengths)
    assert len(bins) <= MAX_LENGTHS
    assert sum(bins.values()) == longest == max(bins)
    ends = list(bins)
    assert all(rows == end - before for before, end, rows in zip([0, *ends], ends, bins.values(), strict=False))


def test_each_file_has_its_place(tmp_path):
    file = tmp_path / "in here" / "a.jsonl"
    file.parent.mkdir()
    file.write_text("{}")
    hub = HubSource("team/rows", None, "train")
    sources = [FileSource("train", tmp_path, (file,), prefix="train/"), hub]
    of_another_host = {"name": "train/shard-2.jsonl", "bytes": 3, "sha256": "33"}
    files = [{**A, "name": "train/in here/a.jsonl"}, {"name": hub.title, "bytes": 9, "sha256": "f"}, of_another_host]
    report = DataReport(files=files, num_rows=2, num_tokens=30, num_supervised_tokens=10, lengths=Counter({15: 2}))
    described = describe_split("train", report, sources)
    assert [source["uri"] for source in described["sources"]] == [file.as_uri(), "hf://datasets/team/rows", None]
    assert (described["rows"], described["tokens"], described["supervised_tokens"]) == (2, 30, 10)
    assert described["summary"] == report.summary()
