# SPDX-License-Identifier: Apache-2.0
"""Rows come out of every container whole, in order and numbered; damage is told; memory does not grow with the file."""

import csv
import gzip
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
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_trainer.common.errors import UserError
from llm_trainer.readers import files as row_files
from llm_trainer.readers import json as json_rows
from llm_trainer.readers.discovery import find_files, find_ignored_files
from llm_trainer.readers.files import read_chunks
from llm_trainer.readers.json import DuplicateKey, parse_json
from llm_trainer.readers.rows import BadRow, DamagedFile

ROWS = [{"text": "a"}, {"text": "b\u00e9\U0001f600"}, {"text": "c", "n": [1, 2.5, None, True]}]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
NOISE = b"".join(json.dumps({"text": random.Random(i).randbytes(50).hex()}).encode() + b"\n" for i in range(2000))


def compress_gzip(content):
    return gzip.compress(content, mtime=0)  # without the time, because it goes into the ids of tests


def compress_zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def write(folder, name, content):
    file = folder / name
    file.write_bytes(content)
    return file


def read(file, max_rows=2):
    """Numbers and rows; lines of bytes are parsed."""
    numbers, rows = [], []
    for chunk in read_chunks(file, file.name, max_rows):
        assert chunk.file == file.name
        assert 0 < len(chunk.rows) == len(chunk.numbers) <= max_rows
        numbers += chunk.numbers
        rows += [parse_json(row) if isinstance(row, bytes) else row for row in chunk.rows]
    return numbers, rows


def damage_of(file):
    """The rows before the damage, and its sentence."""
    rows = []
    with pytest.raises(DamagedFile) as caught:
        for chunk in read_chunks(file, file.name, 2):
            rows += chunk.rows
    return rows, str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "numbers"),
    [
        ("a.jsonl", LINES, [1, 2, 3]),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\n"), [1, 3, 5]),
        ("a.ndjson", b"\n \n" + LINES.rstrip(), [3, 4, 5]),
        ("a.json", LINES, [1, 2, 3]),
        ("a.json", json.dumps(ROWS).encode(), [1, 2, 3]),
        ("a.jsonl", b"\xef\xbb\xbf \n" + json.dumps(ROWS, indent=1, ensure_ascii=False).encode() + b"\n\n", [1, 2, 3]),
        ("a.json", "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(), [1, 2, 3]),
        ("a.json", "".join(json.dumps(row) for row in ROWS).encode(), [1, 2, 3]),
        ("a.jsonl.gz", compress_gzip(LINES), [1, 2, 3]),
        ("a.json.gz", compress_gzip(LINES[:20]) + compress_gzip(LINES[20:]), [1, 2, 3]),
        ("a.json.zst", compress_zstd(json.dumps(ROWS).encode()), [1, 2, 3]),
        ("a.jsonl.zst", compress_zstd(LINES[:20]) + compress_zstd(LINES[20:]), [1, 2, 3]),
        # pzstd tells the size of each frame in a frame to be skipped before it
        ("a.jsonl.zst", b"P*M\x18\x04\0\0\0abcd" + compress_zstd(LINES), [1, 2, 3]),
    ],
)
def test_json_is_read_whatever_its_layout_and_compression(tmp_path, name, content, numbers):
    assert read(write(tmp_path, name, content)) == (numbers, ROWS)


def test_lines_stay_bytes_and_one_object_over_many_lines_is_one_row(tmp_path):
    (chunk,) = read_chunks(write(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"a": \xff}\nnot json'), "a.jsonl", 9)
    assert chunk.rows == [b'{"a": \xff}\n', b"not json"]
    wrapper = {"data": [{"text": "a"}, {"text": "b"}]}
    assert read(write(tmp_path, "b.json", json.dumps(wrapper, indent=4).encode())) == ([1], [wrapper])
    assert read(write(tmp_path, "c.json", json.dumps(wrapper).encode())) == ([1], [wrapper])


@pytest.mark.parametrize("content", [b"", b" \n\t\r\n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_files_without_anything_in_them_have_no_rows(tmp_path, suffix, content):
    assert read(write(tmp_path, f"a{suffix}", content)) == ([], [])
    assert read(write(tmp_path, f"a{suffix}.gz", compress_gzip(content))) == ([], [])
    assert read(write(tmp_path, f"a{suffix}.zst", compress_zstd(content))) == ([], [])
    assert read(write(tmp_path, f"b{suffix}.gz", b"")) == ([], [])


def test_empty_arrays_have_no_rows(tmp_path):
    assert read(write(tmp_path, "a.json", b"[]")) == read(write(tmp_path, "b.json", b" [ \n ] ")) == ([], [])


@pytest.mark.parametrize(
    ("content", "num_rows", "sentence"),
    [
        (b'[{"a": 1}\n,  oops]', 1, "line 2 is not valid JSON (Expecting value at column 4): mend or remove it."),
        (b'[{"a": 1} {"a": 2}]', 1, "line 1 is not valid JSON (Expecting ',' delimiter at column 11): mend"),
        (b"[1, 2,]", 2, "line 1 is not valid JSON (Expecting value at column 7)"),
        (b'["a\nb"]', 0, "line 1 is not valid JSON (Invalid control character at column 4)"),
        (b'\n\n{\n"a": 1\n}\n{"a" 2}', 1, "line 6 is not valid JSON (Expecting ':' delimiter at column 6)"),
        (b"[1, " + b"2" * 5000 + b"]", 1, "line 1 is not valid JSON (Too long a number at column 5)"),
        (b"[" * 100000, 0, "line 1 is not valid JSON (Too many brackets in brackets at column 2)"),
        (b"[1]\n\n[2]", 1, "line 3 goes on after the JSON array has ended: write one array, or one object a line."),
        (b"[1, 2", 2, "ends in the middle of its JSON array, after row 2: it was cut off; upload it again."),
        (b"[1, 2, ", 2, "ends in the middle of its JSON array, after row 2: it was cut off"),
        (b"[1, 2, fal", 2, "ends in the middle of its JSON array, after row 2: it was cut off"),
        (b'[1, {"a": "b', 1, "ends in the middle of its JSON array, after row 1: it was cut off"),
        (b'[1, {"a": "\\u12', 1, "ends in the middle of its JSON array, after row 1: it was cut off"),
        (b"[", 0, "ends in the middle of its JSON array, before its first row: it was cut off"),
        (b'{\n"a": 1\n}\n{"a"', 1, "ends in the middle of a JSON object, after row 1: it was cut off"),
    ],
)
@pytest.mark.parametrize("read_bytes", [1, 2**20])
def test_damaged_json_is_told_with_its_place_after_the_rows_before_it(
    tmp_path, monkeypatch, content, num_rows, sentence, read_bytes
):
    monkeypatch.setattr(json_rows, "READ_BYTES", read_bytes)
    rows, text = damage_of(write(tmp_path, "a.json", content))
    assert len(rows) == num_rows
    assert text.startswith(f"a.json {sentence}")


def test_a_broken_first_line_does_not_spoil_the_other_lines(tmp_path):
    for name, head in [("a.json", b'{"a": oops}\n'), ("a.json", b'{"a": "b\n'), ("a.jsonl", b'{"a":\n')]:
        (chunk,) = read_chunks(write(tmp_path, name, head + LINES), name, 9)
        assert chunk.rows == [head, *LINES.splitlines(keepends=True)]


def test_bad_rows_of_an_array_do_not_end_it(tmp_path):
    content = b'[{"a": {"b": 1, "c": "]", "b": 2}}, {"a": "\xff"}, {"a": "\xc3\xa9"}]'
    assert read(write(tmp_path, "a.json", content))[1] == [
        BadRow("has the key 'b' twice"),
        BadRow("is not UTF-8 text"),
        {"a": "\u00e9"},
    ]


def test_json_texts_are_parsed_without_losing_keys():
    assert parse_json(b'\xef\xbb\xbf{"a": NaN}\r\n')["a"] != 0
    assert parse_json("\ufeff[1]") == [1]
    with pytest.raises(DuplicateKey, match=r"^has the key 'text' twice$"):
        parse_json('[{"text": 1, "text": 1}]')
    with pytest.raises(UnicodeDecodeError):
        parse_json(b'"\xff"')
    for text in ["", "{", "1 2", "[" * 100000, "1" * 5000]:
        with pytest.raises(json.JSONDecodeError):
            parse_json(text)


@pytest.mark.parametrize(
    ("suffix", "codec", "compress"), [("gz", "gzip", compress_gzip), ("zst", "zstd", compress_zstd)]
)
def test_cut_and_damaged_compressed_files_are_told(tmp_path, suffix, codec, compress):
    whole = compress(NOISE)
    cut = "it was cut off; upload it again."
    for content in (whole[: len(whole) // 2], whole[:-1], whole[:5], whole + whole[:-1]):
        rows, text = damage_of(write(tmp_path, f"a.jsonl.{suffix}", content))
        place = f"after line {len(rows)}" if rows else "before its first row"
        assert text == f"a.jsonl.{suffix} ends in the middle of its {codec} stream ({place}): {cut}"
        assert NOISE.startswith(b"".join(rows[:2000]))
    rows, text = damage_of(write(tmp_path, f"a.jsonl.{suffix}", whole + b"junk"))
    assert len(rows) > 1500
    assert text.startswith(f"a.jsonl.{suffix} is damaged after line {len(rows)} (")
    assert damage_of(write(tmp_path, f"a.csv.{suffix}", b"text\n"))[1] == (
        f"a.csv.{suffix} is not a {codec} file: compress it, or name it a.csv."
    )


def test_lines_before_a_cut_in_gzip_are_all_there(tmp_path):
    file = write(tmp_path, "train.jsonl.gz", compress_gzip(LINES)[:-9])
    rows, text = damage_of(file)
    assert rows == LINES.splitlines(keepends=True)
    assert text.startswith("train.jsonl.gz ends in the middle of its gzip stream (after line 3): it was cut off")
    rows, text = damage_of(write(tmp_path, "a.json.gz", compress_gzip(json.dumps(ROWS).encode())[:-9]))
    assert rows == ROWS[:2]  # of the last row nobody knows whether it goes on
    assert text.startswith("a.json.gz ends in the middle of its gzip stream (after row 2)")


def test_changed_bytes_in_gzip_are_told(tmp_path):
    content = bytearray(compress_gzip(NOISE))
    content[-6] ^= 0xFF
    rows, text = damage_of(write(tmp_path, "a.jsonl.gz", content))
    assert len(rows) == 2000
    assert "is damaged after line 2000 (CRC check failed" in text


def test_csv_cells_are_text_under_the_names_of_the_header(tmp_path):
    content = '\ufeff\ntext,"a label"\r\n"x, ""y""\nz",1\r\n\r\n\u00e9,\r\none\r\n1,2,3\r\n'.encode()
    assert read(write(tmp_path, "a.csv", content)) == (
        [1, 2, 3, 4],
        [
            {"text": 'x, "y"\nz', "a label": "1"},
            {"text": "\u00e9", "a label": ""},
            BadRow("has 1 cell and the header has 2"),
            BadRow("has 3 cells and the header has 2"),
        ],
    )
    assert read(write(tmp_path, "b.csv.gz", compress_gzip(b"a\rb\rc")))[1] == [{"a": "b"}, {"a": "c"}]


def test_csv_cells_may_be_very_long(tmp_path):
    cell = "x" * 10_000_000
    assert read(write(tmp_path, "a.csv", f"text\n{cell}\n".encode()))[1] == [{"text": cell}]


@pytest.mark.parametrize(
    ("content", "num_rows", "sentence"),
    [
        (b"a,b,a\n1,2,3\n", 0, "has the column 'a' twice: rename or remove one of them."),
        (b"a, \n1,2\n", 0, "has no name for column 2: name it, or remove it."),
        (
            b'a\nb\n"c\n',
            1,
            "ends in the middle of a quoted cell, after row 1: close the quote, or upload the whole file.",
        ),
        (b'a\nb\n"c"d\n', 1, "line 3 is not valid CSV (',' expected after '\"'): mend or remove it."),
        (b"a\nb\nc\n\xff\n", 2, "line 4 is not UTF-8 text: save it as UTF-8."),
    ],
)
def test_damaged_csv_is_told(tmp_path, content, num_rows, sentence):
    rows, text = damage_of(write(tmp_path, "a.csv", content))
    assert len(rows) == num_rows
    assert text == f"a.csv {sentence}"


CALLS = [{"type": "function", "function": {"name": "f"}}]
TABLE = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": CALLS}], "text": None},
    {"messages": None, "text": "b"},
    {"messages": [], "text": "c"},
]


def write_arrow(new, file, rows=TABLE, batch_rows=2):
    table = pa.Table.from_pylist(rows)
    with new(str(file), table.schema) as writer:
        for batch in table.to_batches(batch_rows):
            writer.write_batch(batch)
    return file


def test_tables_give_rows_without_the_nested_fields_that_arrow_adds(tmp_path):
    pq.write_table(pa.Table.from_pylist(TABLE), tmp_path / "a.parquet", row_group_size=2)
    for file in (
        tmp_path / "a.parquet",
        write_arrow(pa.ipc.new_stream, tmp_path / "stream.arrow"),
        write_arrow(pa.ipc.new_file, tmp_path / "file.arrow"),
    ):
        for max_rows in (1, 2, 9):
            assert read(file, max_rows) == ([1, 2, 3], TABLE)


def test_tables_without_rows_have_none(tmp_path):
    table = pa.table({"text": pa.array([], pa.string())})
    pq.write_table(table, tmp_path / "a.parquet")
    Dataset.from_list([]).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "a.parquet") == ([], [])
    assert find_files(tmp_path / "saved") == []


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("content", [b"", b"PAR1", b"\xff\xff\xff\xff", b"ARROW1\0\0", b"garbage" * 99])
def test_files_that_are_no_tables_are_told(tmp_path, name, content):
    rows, text = damage_of(write(tmp_path, name, content))
    assert not rows
    assert text.startswith(f"{name} is damaged before its first row (")


def test_tables_cut_anywhere_are_told(tmp_path):
    pq.write_table(pa.Table.from_pylist(TABLE), tmp_path / "a.parquet")
    write_arrow(pa.ipc.new_stream, tmp_path / "stream.arrow")
    write_arrow(pa.ipc.new_file, tmp_path / "file.arrow")
    for file in list(tmp_path.iterdir()):
        content = file.read_bytes()
        for length in range(0, len(content), 8):
            rows, text = damage_of(write(tmp_path, file.name, content[:length]))
            assert rows == TABLE[: len(rows)]
            assert text.startswith(file.name)


def test_an_arrow_stream_cut_between_two_batches_is_told(tmp_path):
    file = write_arrow(pa.ipc.new_stream, tmp_path / "a.arrow")
    rows, text = damage_of(write(tmp_path, "a.arrow", file.read_bytes()[:-8]))
    assert rows == TABLE
    assert text == "a.arrow ends without Arrow's mark of the end: it was cut off; upload it again."


def test_columns_that_would_hide_each_other_and_values_without_a_python_type_are_told(tmp_path):
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "a.parquet")
    assert damage_of(tmp_path / "a.parquet")[1].startswith("a.parquet has the column 'text' twice")
    pq.write_table(pa.table({"when": pa.array([2**60], pa.timestamp("us"))}), tmp_path / "b.parquet")
    assert damage_of(tmp_path / "b.parquet")[1].startswith("b.parquet is damaged before its first row (")
    text = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff"))
    with pa.ipc.new_stream(str(tmp_path / "c.arrow"), pa.schema({"text": pa.string()})) as writer:
        writer.write_batch(pa.record_batch({"text": text}))
    assert "Invalid UTF8" in damage_of(tmp_path / "c.arrow")[1]


def test_chunks_end_early_once_they_hold_many_bytes(tmp_path):
    rows = [{"text": "x" * 1000}] * 100
    names = ["a.jsonl", "b.json", "c.csv", "d.parquet", "e.arrow"]
    write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)).encode())
    write(tmp_path, "b.json", json.dumps(rows).encode())
    write(tmp_path, "c.csv", b"text\n" + b"\n".join(row["text"].encode() for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    write_arrow(pa.ipc.new_stream, tmp_path / "e.arrow", rows, 100)
    for name in names:
        chunks = list(read_chunks(tmp_path / name, name, 1000, 10_000))
        assert sum(len(chunk.rows) for chunk in chunks) == 100
        assert all(5 <= len(chunk.rows) <= 15 for chunk in chunks[:-1]), name
        assert all(len(chunk.rows) == 1 for chunk in read_chunks(tmp_path / name, name, 1000, 1))


def test_data_files_are_found_by_path_and_the_others_are_told(tmp_path):
    data = [
        "a b.csv",
        "a/x.jsonl.gz",
        "b/state.json",
        "d\u00e9.json",
        "e.ndjson.zst",
        "f.parquet",
        "g/h.arrow",
        "i.arrow",
    ]
    quiet = [".hidden.json", ".h/y.json", "README.md", "LICENSE", "notes.md", "_SUCCESS", "dataset_infos.json"]
    quiet += ["cache-1234.arrow", "x.lock", "dataset_info.json", "g/state.json", "g/left-over.arrow"]
    told = ["a/c.txt", "data.JSONL", "train.parquet.gz", "z.zip"]
    for name in data + quiet + told:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"_data_files": [{"filename": "h.arrow"}]}')
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a/c.txt")
    (tmp_path / "nowhere.jsonl").symlink_to(tmp_path / "gone")
    found = [file.relative_to(tmp_path).as_posix() for file in find_files(tmp_path)]
    assert found == sorted([*data, "link.jsonl", "nowhere.jsonl"], key=Path)
    assert find_ignored_files(tmp_path) == sorted(told, key=Path)
    assert find_files(tmp_path / "a/c.txt") == [tmp_path / "a/c.txt"]
    assert find_ignored_files(tmp_path / "a/c.txt") == []
    for name in ("nowhere.jsonl", "nowhere.parquet", "nowhere.arrow", "nowhere.csv.gz"):
        assert damage_of(tmp_path / name)[1] == (
            f"{name} cannot be read before its first row (No such file or directory): "
            "check that it is there and readable."
        )


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read_are_told(tmp_path):
    for name in ("a.jsonl", "a.parquet", "a.arrow"):
        write(tmp_path, name, LINES).chmod(0)
        assert "cannot be read before its first row (Permission denied)" in damage_of(tmp_path / name)[1]


def test_saved_datasets_are_read_in_order_through_the_files_that_they_name(tmp_path):
    rows = [{"text": str(number)} for number in range(50)]
    Dataset.from_list(rows).save_to_disk(tmp_path, num_shards=12)
    write(tmp_path, "left-over.arrow", b"")
    write(tmp_path, "cache-1234.arrow", b"")
    files = find_files(tmp_path)
    assert len(files) == 12
    assert [row for file in files for row in read(file)[1]] == rows
    assert find_ignored_files(tmp_path) == []
    files[3].unlink()
    with pytest.raises(UserError, match=r"state\.json names data-00003-of-00012\.arrow, which is not there"):
        find_files(tmp_path)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"state\.json is not what save_to_disk writes"):
        find_files(tmp_path)


def test_of_a_saved_dataset_dict_only_one_split_is_read(tmp_path):
    DatasetDict({name: Dataset.from_list([{"text": name}]) for name in ("test", "train")}).save_to_disk(tmp_path)
    assert [read(file)[1] for file in find_files(tmp_path, ("training", "train", "test"))] == [[{"text": "train"}]]
    assert [read(file)[1] for file in find_files(tmp_path / "test")] == [[{"text": "test"}]]
    with pytest.raises(
        UserError, match=r"holds the splits test, train and none that was looked for \(validation, val\)"
    ):
        find_files(tmp_path, ("validation", "val"))


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
                file = write(Path(folder), name + suffix, packed)
                assert read(file, max_rows) == (numbers, rows)


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


def test_long_rows_of_an_array_do_not_pile_up_and_are_not_parsed_over_and_over(tmp_path, monkeypatch):
    parsed = []
    decode = json_rows.decode_value
    monkeypatch.setattr(
        json_rows, "decode_value", lambda text, at: (parsed.append(len(text) - at), decode(text, at))[1]
    )
    row = json.dumps({"text": "x" * 10_000_000})
    file = write(tmp_path, "a.json", f"[{row},\n{row}]".encode())
    assert [len(chunk.rows) for chunk in read_chunks(file, "a.json", 1000)] == [1, 1]
    assert sum(parsed) < 6 * 2 * len(row)
