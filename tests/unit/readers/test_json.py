# SPDX-License-Identifier: Apache-2.0
"""JSON becomes rows whatever its layout; what is wrong with it is told with its place."""

import json
from pathlib import Path

import pytest

from llm_trainer.readers import json as json_rows
from llm_trainer.readers.files import read_chunks
from llm_trainer.readers.json import DuplicateKey, parse_json
from llm_trainer.readers.rows import MAX_ROW_BYTES, BadRow
from support.data_files import LINES, ROWS, compress_gzip, compress_zstd, read_damaged, read_rows, write_file


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
    assert read_rows(write_file(tmp_path, name, content)) == (numbers, ROWS)


def test_lines_stay_bytes_and_one_object_over_many_lines_is_one_row(tmp_path):
    (chunk,) = read_chunks(write_file(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"a": \xff}\nnot json'), "a.jsonl", 9)
    assert chunk.rows == [b'{"a": \xff}\n', b"not json"]
    wrapper = {"data": [{"text": "a"}, {"text": "b"}]}
    assert read_rows(write_file(tmp_path, "b.json", json.dumps(wrapper, indent=4).encode())) == ([1], [wrapper])
    assert read_rows(write_file(tmp_path, "c.json", json.dumps(wrapper).encode())) == ([1], [wrapper])


def test_empty_arrays_have_no_rows(tmp_path):
    assert (
        read_rows(write_file(tmp_path, "a.json", b"[]"))
        == read_rows(write_file(tmp_path, "b.json", b" [ \n ] "))
        == ([], [])
    )


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
    rows, text = read_damaged(write_file(tmp_path, "a.json", content))
    assert len(rows) == num_rows
    assert text.startswith(f"a.json {sentence}")


def test_a_broken_first_line_does_not_spoil_the_other_lines(tmp_path):
    for name, head in [("a.json", b'{"a": oops}\n'), ("a.json", b'{"a": "b\n'), ("a.jsonl", b'{"a":\n')]:
        (chunk,) = read_chunks(write_file(tmp_path, name, head + LINES), name, 9)
        assert chunk.rows == [head, *LINES.splitlines(keepends=True)]


def test_bad_rows_of_an_array_do_not_end_it(tmp_path):
    content = b'[{"a": {"b": 1, "c": "]", "b": 2}}, {"a": "\xff"}, {"a": "\xc3\xa9"}]'
    assert read_rows(write_file(tmp_path, "a.json", content))[1] == [
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


def test_long_rows_of_an_array_do_not_pile_up_and_are_not_parsed_over_and_over(tmp_path, monkeypatch):
    parsed = []
    decode = json_rows.decode_value
    monkeypatch.setattr(
        json_rows, "decode_value", lambda text, at: (parsed.append(len(text) - at), decode(text, at))[1]
    )
    row = json.dumps({"text": "x" * 10_000_000})
    file = write_file(tmp_path, "a.json", f"[{row},\n{row}]".encode())
    assert [len(chunk.rows) for chunk in read_chunks(file, "a.json", 1000)] == [1, 1]
    assert sum(parsed) < 6 * 2 * len(row)


def test_no_reader_is_run_as_a_script():
    """A script's folder comes first in sys.path: `import json` would find the reader instead of Python's module."""
    folder = Path(json_rows.__file__).parent
    assert not [file.name for file in folder.glob("*.py") if "__main__" in file.read_text(encoding="utf-8")]


def nest(depth):
    return '{"text": "b", "more": ' + "[" * (depth - 1) + "]" * (depth - 1) + "}"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (nest(900), "nests more than 64 lists and objects in each other"),
        ('{"text": "' + "b" * MAX_ROW_BYTES + '"}', "is longer than 16 MiB"),
        (json.dumps(dict.fromkeys(map(str, range(40_000)), 1))[:-1] + ', "39999": 2}', "has the key '39999' twice"),
    ],
)
def test_a_hostile_row_is_bad_and_its_neighbours_are_read(tmp_path, name, row, reason):
    lines = ['{"text": "a"}', row, '{"text": "c"}']
    content = f"[{','.join(lines)}]" if name == "a.json" else "\n".join(lines)
    rows = [row for chunk in read_chunks(write_file(tmp_path, name, content.encode()), name, 9) for row in chunk.rows]
    parsed = []
    for each in rows:
        try:
            parsed.append(parse_json(each) if isinstance(each, bytes) else each)
        except ValueError as error:
            parsed.append(BadRow(str(error)))
    assert parsed == [{"text": "a"}, BadRow(reason), {"text": "c"}]


def test_an_array_whose_row_does_not_end_is_not_read_into_memory(tmp_path):
    content = b'[{"text": "a"}, {"text": "' + b"b" * (3 * MAX_ROW_BYTES)
    rows, damage = read_damaged(write_file(tmp_path, "a.json", content))
    assert rows == [{"text": "a"}]
    assert damage == "a.json row 2 is longer than 16 MiB: split or remove it."
