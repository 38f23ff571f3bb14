# SPDX-License-Identifier: Apache-2.0
"""CSV, Parquet and Arrow become rows whole and in order, and damage is told."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from llm_trainer.readers.discovery import find_files
from llm_trainer.readers.rows import BadRow
from support.data_files import compress_gzip, read_damaged, read_rows, write_arrow, write_file


def test_csv_cells_are_text_under_the_names_of_the_header(tmp_path):
    content = '\ufeff\ntext,"a label"\r\n"x, ""y""\nz",1\r\n\r\n\u00e9,\r\none\r\n1,2,3\r\n'.encode()
    assert read_rows(write_file(tmp_path, "a.csv", content)) == (
        [1, 2, 3, 4],
        [
            {"text": 'x, "y"\nz', "a label": "1"},
            {"text": "\u00e9", "a label": ""},
            BadRow("has 1 cell and the header has 2"),
            BadRow("has 3 cells and the header has 2"),
        ],
    )
    assert read_rows(write_file(tmp_path, "b.csv.gz", compress_gzip(b"a\rb\rc")))[1] == [{"a": "b"}, {"a": "c"}]


def test_csv_cells_may_be_very_long(tmp_path):
    cell = "x" * 10_000_000
    assert read_rows(write_file(tmp_path, "a.csv", f"text\n{cell}\n".encode()))[1] == [{"text": cell}]


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
    rows, text = read_damaged(write_file(tmp_path, "a.csv", content))
    assert len(rows) == num_rows
    assert text == f"a.csv {sentence}"


CALLS = [{"type": "function", "function": {"name": "f"}}]
TABLE = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": CALLS}], "text": None},
    {"messages": None, "text": "b"},
    {"messages": [], "text": "c"},
]


def test_tables_give_rows_without_the_nested_fields_that_arrow_adds(tmp_path):
    pq.write_table(pa.Table.from_pylist(TABLE), tmp_path / "a.parquet", row_group_size=2)
    for file in (
        tmp_path / "a.parquet",
        write_arrow(pa.ipc.new_stream, tmp_path / "stream.arrow", TABLE),
        write_arrow(pa.ipc.new_file, tmp_path / "file.arrow", TABLE),
    ):
        for max_rows in (1, 2, 9):
            assert read_rows(file, max_rows) == ([1, 2, 3], TABLE)


def test_tables_without_rows_have_none(tmp_path):
    table = pa.table({"text": pa.array([], pa.string())})
    pq.write_table(table, tmp_path / "a.parquet")
    Dataset.from_list([]).save_to_disk(tmp_path / "saved")
    assert read_rows(tmp_path / "a.parquet") == ([], [])
    assert find_files(tmp_path / "saved")[0] == []


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("content", [b"", b"PAR1", b"\xff\xff\xff\xff", b"ARROW1\0\0", b"garbage" * 99])
def test_files_that_are_no_tables_are_told(tmp_path, name, content):
    rows, text = read_damaged(write_file(tmp_path, name, content))
    assert not rows
    assert text.startswith(f"{name} is damaged before its first row (")


def test_tables_cut_anywhere_are_told(tmp_path):
    pq.write_table(pa.Table.from_pylist(TABLE), tmp_path / "a.parquet")
    write_arrow(pa.ipc.new_stream, tmp_path / "stream.arrow", TABLE)
    write_arrow(pa.ipc.new_file, tmp_path / "file.arrow", TABLE)
    for file in list(tmp_path.iterdir()):
        content = file.read_bytes()
        for length in range(0, len(content), 8):
            rows, text = read_damaged(write_file(tmp_path, file.name, content[:length]))
            assert rows == TABLE[: len(rows)]
            assert text.startswith(file.name)


def test_an_arrow_stream_cut_between_two_batches_is_told(tmp_path):
    file = write_arrow(pa.ipc.new_stream, tmp_path / "a.arrow", TABLE)
    rows, text = read_damaged(write_file(tmp_path, "a.arrow", file.read_bytes()[:-8]))
    assert rows == TABLE
    assert text == "a.arrow ends without Arrow's mark of the end: it was cut off; upload it again."


def test_columns_that_would_hide_each_other_and_values_without_a_python_type_are_told(tmp_path):
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "a.parquet")
    assert read_damaged(tmp_path / "a.parquet")[1].startswith("a.parquet has the column 'text' twice")
    pq.write_table(pa.table({"when": pa.array([2**60], pa.timestamp("us"))}), tmp_path / "b.parquet")
    assert read_damaged(tmp_path / "b.parquet")[1].startswith("b.parquet is damaged before its first row (")
    text = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff"))
    with pa.ipc.new_stream(str(tmp_path / "c.arrow"), pa.schema({"text": pa.string()})) as writer:
        writer.write_batch(pa.record_batch({"text": text}))
    assert "Invalid UTF8" in read_damaged(tmp_path / "c.arrow")[1]


def test_a_table_with_very_many_columns_is_read_at_once(tmp_path):
    header = ",".join(f"k{number}" for number in range(50_000))
    file = write_file(tmp_path, "a.csv", f"{header}\n{'1,' * 49_999}1\n".encode())
    assert len(read_rows(file)[1][0]) == 50_000
    twice = write_file(tmp_path, "b.csv", f"{header},k49999\n".encode())
    assert read_damaged(twice)[1] == "b.csv has the column 'k49999' twice: rename or remove one of them."


def test_a_csv_line_without_an_end_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("llm_trainer.readers.tables.MAX_CELL", 1000)
    file = write_file(tmp_path, "a.csv", b"text\na\n" + b"b," * 1000)
    assert read_damaged(file)[1] == "a.csv line 3 is longer than 0 MiB: mend or remove it."
