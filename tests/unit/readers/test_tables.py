# SPDX-License-Identifier: Apache-2.0
"""CSV, Parquet and Arrow become rows whole and in order, and damage is told."""

from datetime import datetime
from decimal import Decimal
from uuid import UUID

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


def test_cells_of_tsv_are_apart_by_tabs(tmp_path):
    content = b'text\ttools\na, "b"\t[1, 2]\n"c\td"\t"[""e""]"\none\n'
    rows = [{"text": 'a, "b"', "tools": "[1, 2]"}, {"text": "c\td", "tools": '["e"]'}]
    bad = BadRow("has 1 cell and the header has 2")
    assert read_rows(write_file(tmp_path, "a.tsv", content))[1] == [*rows, bad]
    assert read_rows(write_file(tmp_path, "b.tsv.gz", compress_gzip(content)))[1] == [*rows, bad]


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
ASKED = {"role": "user", "content": "a", "tool_calls": None}
TABLE = [
    {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": CALLS}], "text": None},
    {"messages": None, "text": "b"},
    {"messages": [], "text": "c"},
]


def test_tables_give_their_rows_whole_and_in_order(tmp_path):
    pq.write_table(pa.Table.from_pylist(TABLE), tmp_path / "a.parquet", row_group_size=2)
    for file in (
        tmp_path / "a.parquet",
        write_arrow(pa.ipc.new_stream, tmp_path / "stream.arrow", TABLE),
        write_arrow(pa.ipc.new_file, tmp_path / "file.arrow", TABLE),
    ):
        for max_rows in (1, 2, 9):
            assert read_rows(file, max_rows) == ([1, 2, 3], TABLE)


JSON_TEXTS = ['{"n": 12345678901234567890, "s": "\u6771\\u4eac", "l": [1, {"k": null}]}', '"2024-05-01"', None]
MOMENT = datetime(2024, 5, 1, 10, 30)
MAPS_IN_A_LIST = pa.list_view(pa.struct([("a", pa.map_(pa.string(), pa.string()))]))
VALUES = [
    (
        pa.json_(),
        JSON_TEXTS,
        [{"n": 12345678901234567890, "s": "\u6771\u4eac", "l": [1, {"k": None}]}, "2024-05-01", None],
    ),
    (pa.json_(pa.large_string()), ['{"a": 1}'], [{"a": 1}]),
    (pa.map_(pa.string(), pa.int64()), [[("a", 1), ("b", None)], [], None], [{"a": 1, "b": None}, {}, None]),
    (pa.map_(pa.int32(), pa.list_(pa.date32())), [[(7, [MOMENT.date(), None])]], [{"7": ["2024-05-01", None]}]),
    (MAPS_IN_A_LIST, [[{"a": [("k", "v")]}, None]], [[{"a": {"k": "v"}}, None]]),
    (pa.struct([("at", pa.timestamp("us"))]), [{"at": MOMENT}], [{"at": "2024-05-01T10:30:00"}]),
    (pa.timestamp("s"), [MOMENT, datetime(2024, 5, 1)], ["2024-05-01T10:30:00", "2024-05-01"]),
    (pa.timestamp("ns", "UTC"), [MOMENT], ["2024-05-01T10:30:00+00:00"]),
    (pa.time64("us"), [MOMENT.time()], ["10:30:00"]),
    (pa.decimal128(38, 2), [Decimal("1.50"), Decimal("123456789012345678901.00")], [1.5, 123456789012345678901]),
    (pa.binary(), ["\u00e9".encode(), b"\xff"], ["\u00e9", b"\xff"]),
    (pa.large_binary(), [b"a"], ["a"]),
    (pa.binary_view(), [b"a", None], ["a", None]),
    (pa.uuid(), [UUID(int=1).bytes], ["00000000-0000-0000-0000-000000000001"]),
    (pa.dictionary(pa.int32(), pa.string()), ["a", None, "a"], ["a", None, "a"]),
    (pa.large_string(), ["\U0001f600"], ["\U0001f600"]),
    (pa.string_view(), ["a" * 20, None], ["a" * 20, None]),
    (pa.large_list_view(pa.int64()), [[1, 2], None, []], [[1, 2], None, []]),
    (pa.struct([]), [{}, None], [{}, None]),
]


@pytest.mark.parametrize(("kind", "values", "wanted"), VALUES, ids=lambda value: str(value)[:30])
def test_cells_are_what_json_has_in_their_place(tmp_path, kind, values, wanted):
    table = pa.table({"cell": pa.array(values, kind)})
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    if kind != pa.struct([]):  # which Parquet cannot hold
        pq.write_table(table, tmp_path / "a.parquet")
    for file in tmp_path.iterdir():
        cells = [row["cell"] for row in read_rows(file)[1]]
        assert cells == wanted
        assert list(map(type, cells)) == list(map(type, wanted))


def test_cells_that_are_not_the_json_they_say_or_have_a_key_twice_make_bad_rows(tmp_path):
    cells = pa.array(['{"a": ', '{"a": 1, "a": 2}', "1"], pa.json_())
    pairs = pa.array([[("k", 1), ("k", 2)], [], []], pa.map_(pa.string(), pa.int64()))
    pq.write_table(pa.table({"cell": cells}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"pairs": pairs}), tmp_path / "b.parquet")
    broken, double, sound = read_rows(tmp_path / "a.parquet")[1]
    assert broken.reason.startswith("has a column 'cell' that cannot be read (Expecting value")
    assert double == BadRow("has a column 'cell' that cannot be read (has the key 'a' twice)")
    assert sound == {"cell": 1}
    twice = BadRow("has a column 'pairs' that cannot be read (has the key 'k' twice)")
    assert read_rows(tmp_path / "b.parquet")[1] == [twice, {"pairs": {}}, {"pairs": {}}]


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
