# SPDX-License-Identifier: Apache-2.0
"""The same rows in every kind of file and data set that is read."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
from datasets import Dataset, load_dataset

from llm_trainer.readers.discovery import find_files
from llm_trainer.readers.sources import FileSource, HubSource
from support.data_files import compress_zstd

Rows = list[dict[str, Any]]


def write_kinds(folder: Path, rows: Rows, are_mixed: bool = False) -> dict[str, FileSource]:
    """Write the rows in every kind of file; mixed rows have fields of several types, which only JSON's type holds."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = write_cells(rows, columns, ",")
    contents = {
        "array.json": json.dumps(rows, indent=1).encode(),
        "lines.jsonl": lines,
        "lines.jsonl.gz": gzip.compress(lines),
        "lines.jsonl.zst": compress_zstd(lines),
        "cells.csv": cells,
        "cells.csv.gz": gzip.compress(cells),
        "cells.tsv": write_cells(rows, columns, "\t"),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    saved = Dataset.from_list(rows, on_mixed_types="use_json")
    saved.save_to_disk(folder / "saved")
    saved.to_parquet(folder / "saved.parquet")
    if not are_mixed:
        table = pa.Table.from_pylist(rows)
        pq.write_table(table, folder / "table.parquet")
        views = pa.Table.from_pylist(rows, view_schema(table.schema))  # Parquet takes none within lists
        with pa.ipc.new_stream(str(folder / "views.arrow"), views.schema) as stream:
            stream.write_table(views, max_chunksize=2)
        pa.feather.write_feather(table, folder / "table.feather", compression="lz4")
    tables = [file for kind in ("parquet", "arrow", "feather") for file in folder.glob(f"*.{kind}")]
    places = [*(folder / name for name in contents), *tables]
    sources = {place.name: FileSource("train", folder, (place,)) for place in places}
    return sources | {"saved": FileSource("train", folder, tuple(find_files(folder / "saved")[0]))}


def write_cells(rows: Rows, columns: list[str], separator: str) -> bytes:
    """The rows as lines of cells, below a header."""
    cells = io.StringIO()
    writer = csv.DictWriter(cells, columns, delimiter=separator)
    writer.writeheader()
    writer.writerows({name: show_cell(row.get(name)) for name in columns} for row in rows)
    return cells.getvalue().encode()


def show_cell(value: Any) -> Any:
    """A text as it is, and anything else as JSON text; a missing value as an empty cell."""
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def view_schema(schema: pa.Schema) -> pa.Schema:
    """The schema with Arrow's newer types in place of the older ones."""

    def change(kind: pa.DataType) -> pa.DataType:
        if pa.types.is_struct(kind):
            return pa.struct([(field.name, change(field.type)) for field in kind])
        if pa.types.is_list(kind):
            return pa.large_list_view(change(kind.value_type))
        return pa.string_view() if pa.types.is_string(kind) else kind

    return pa.schema([(field.name, change(field.type)) for field in schema])


def load_as_hub(file: Path, cache: Path) -> tuple[HubSource, Dataset]:
    """A Hub data set that holds the file, and what `datasets` makes of it."""
    builder = "json" if ".json" in file.name else "parquet"
    rows = load_dataset(builder, data_files=str(file), split="train", cache_dir=str(cache))
    return HubSource(f"tiny/{file.name}", None, "train"), rows
