# SPDX-License-Identifier: Apache-2.0
"""Rows come out of every container whole, in order and numbered; memory does not grow with the file."""

import csv
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_trainer.readers import files as row_files
from llm_trainer.readers import json as json_rows
from llm_trainer.readers.files import read_chunks
from support.data_files import (
    LINES,
    ROWS,
    compress_gzip,
    compress_zstd,
    read_damaged,
    read_rows,
    write_arrow,
    write_file,
)

NOISE = b"".join(json.dumps({"text": random.Random(i).randbytes(50).hex()}).encode() + b"\n" for i in range(2000))


@pytest.mark.parametrize("content", [b"", b" \n\t\r\n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_files_without_anything_in_them_have_no_rows(tmp_path, suffix, content):
    assert read_rows(write_file(tmp_path, f"a{suffix}", content)) == ([], [])
    assert read_rows(write_file(tmp_path, f"a{suffix}.gz", compress_gzip(content))) == ([], [])
    assert read_rows(write_file(tmp_path, f"a{suffix}.zst", compress_zstd(content))) == ([], [])
    assert read_rows(write_file(tmp_path, f"b{suffix}.gz", b"")) == ([], [])


@pytest.mark.parametrize(
    ("suffix", "codec", "compress"), [("gz", "gzip", compress_gzip), ("zst", "zstd", compress_zstd)]
)
def test_cut_and_damaged_compressed_files_are_told(tmp_path, suffix, codec, compress):
    whole = compress(NOISE)
    cut = "it was cut off; upload it again."
    for content in (whole[: len(whole) // 2], whole[:-1], whole[:5], whole + whole[:-1]):
        rows, text = read_damaged(write_file(tmp_path, f"a.jsonl.{suffix}", content))
        place = f"after line {len(rows)}" if rows else "before its first row"
        assert text == f"a.jsonl.{suffix} ends in the middle of its {codec} stream ({place}): {cut}"
        assert NOISE.startswith(b"".join(rows[:2000]))
    rows, text = read_damaged(write_file(tmp_path, f"a.jsonl.{suffix}", whole + b"junk"))
    assert len(rows) > 1500
    assert text.startswith(f"a.jsonl.{suffix} is damaged after line {len(rows)} (")
    assert read_damaged(write_file(tmp_path, f"a.csv.{suffix}", b"text\n"))[1] == (
        f"a.csv.{suffix} is not a {codec} file: compress it, or name it a.csv."
    )


def test_lines_before_a_cut_in_gzip_are_all_there(tmp_path):
    file = write_file(tmp_path, "train.jsonl.gz", compress_gzip(LINES)[:-9])
    rows, text = read_damaged(file)
    assert rows == LINES.splitlines(keepends=True)
    assert text.startswith("train.jsonl.gz ends in the middle of its gzip stream (after line 3): it was cut off")
    rows, text = read_damaged(write_file(tmp_path, "a.json.gz", compress_gzip(json.dumps(ROWS).encode())[:-9]))
    assert rows == ROWS[:2]  # of the last row nobody knows whether it goes on
    assert text.startswith("a.json.gz ends in the middle of its gzip stream (after row 2)")


def test_changed_bytes_in_gzip_are_told(tmp_path):
    content = bytearray(compress_gzip(NOISE))
    content[-6] ^= 0xFF
    rows, text = read_damaged(write_file(tmp_path, "a.jsonl.gz", content))
    assert len(rows) == 2000
    assert "is damaged after line 2000 (CRC check failed" in text


def test_chunks_end_early_once_they_hold_many_bytes(tmp_path):
    rows = [{"text": "x" * 1000}] * 100
    names = ["a.jsonl", "b.json", "c.csv", "d.parquet", "e.arrow"]
    write_file(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)).encode())
    write_file(tmp_path, "b.json", json.dumps(rows).encode())
    write_file(tmp_path, "c.csv", b"text\n" + b"\n".join(row["text"].encode() for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    write_arrow(pa.ipc.new_stream, tmp_path / "e.arrow", rows, 100)
    for name in names:
        chunks = list(read_chunks(tmp_path / name, name, 1000, 10_000))
        assert sum(len(chunk.rows) for chunk in chunks) == 100
        assert all(5 <= len(chunk.rows) <= 15 for chunk in chunks[:-1]), name
        assert all(len(chunk.rows) == 1 for chunk in read_chunks(tmp_path / name, name, 1000, 1))


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read_are_told(tmp_path):
    for name in ("a.jsonl", "a.parquet", "a.arrow"):
        write_file(tmp_path, name, LINES).chmod(0)
        assert "cannot be read before its first row (Permission denied)" in read_damaged(tmp_path / name)[1]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=5,
)
WHITE = st.text("\n \t\r", max_size=3)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.text(), VALUES, max_size=3), max_size=8),
    white=st.lists(WHITE, min_size=3, max_size=3),
    is_ascii=st.booleans(),
    max_rows=st.integers(1, 4),
    sizes=st.tuples(st.sampled_from([1, 2, 7]), st.sampled_from([16, 50]), st.sampled_from([3, 5])),
)
def test_what_was_written_is_read_however_small_the_buffers(rows, white, is_ascii, max_rows, sizes):
    texts = [json.dumps(row, ensure_ascii=is_ascii) for row in rows]
    array = white[0] + "[" + white[1] + f"{white[1]},{white[2]}".join(texts) + white[2] + "]" + white[0]
    lines = "".join(text + "\n" * (1 + white[0].count("\n")) for text in texts)
    steps = 1 + white[0].count("\n")
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        places = ((json_rows, "READ_BYTES"), (row_files, "BUFFER_BYTES"), (row_files, "PIECE_BYTES"))
        for (module, name), size in zip(places, sizes, strict=True):
            patch.setattr(module, name, size)
        for name, text, numbers in [
            ("array.json", array, [1 + number for number in range(len(rows))]),
            ("lines.jsonl", lines, [1 + number * steps for number in range(len(rows))]),
        ]:
            content = text.encode()
            for suffix, packed in [("", content), (".gz", compress_gzip(content)), (".zst", compress_zstd(content))]:
                file = write_file(Path(folder), name + suffix, packed)
                assert read_rows(file, max_rows) == (numbers, rows)


MEASURE = """
import sys
from pathlib import Path
from llm_trainer.readers.files import read_chunks
file = Path(sys.argv[1])
print(sum(len(chunk.rows) for chunk in read_chunks(file, file.name, 1000)))
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


def measure(file):
    """The rows of a file, and the peak memory of a process that reads it, in MiB; getrusage's would be its parent's."""
    output = subprocess.run([sys.executable, "-c", MEASURE, str(file)], check=True, capture_output=True, text=True)
    num_rows, kibibytes = map(int, output.stdout.split())
    return num_rows, kibibytes / 1024


def write_many(file, num_rows):
    rows = ({"text": f"{number} " + "words and " * 50} for number in range(num_rows))
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), file)
        return
    with file.open("w", newline="") as stream:
        if file.suffix == ".csv":
            writer = csv.DictWriter(stream, ["text"])
            writer.writeheader()
            writer.writerows(rows)
        else:
            start, between, end = ("[", ",\n", "]") if file.suffix == ".json" else ("", "\n", "")
            stream.write(start + between.join(map(json.dumps, rows)) + end)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    small, large = tmp_path / f"small{suffix}", tmp_path / f"large{suffix}"
    write_many(small, 20_000)
    write_many(large, 200_000)  # 100 MB of text
    (num_small, small_peak), (num_large, large_peak) = measure(small), measure(large)
    assert (num_small, num_large) == (20_000, 200_000)
    assert large_peak < small_peak + 16
