# SPDX-License-Identifier: Apache-2.0
"""Every row of docs/row-formats.md goes through reader and encoder, and becomes what the page says."""

import json
import re
from dataclasses import dataclass
from importlib.resources import files

import pytest
from datasets import Dataset

from llm_trainer.config.schema import Settings
from llm_trainer.data.encoding import Vocabulary
from llm_trainer.data.formats.examples import IGNORED
from llm_trainer.data.report import REJECTED_ROWS
from llm_trainer.data.token_cache import REPORT, ROWS, write_source
from llm_trainer.readers.sources import FileSource
from support.documents import CODE, DOCS
from support.image_rows import build_vocabulary
from support.tiny_model import build_tokenizer
from support.tiny_processors import draw

HEADING = re.compile(r"^#+ (.+)$")
SETTING = re.compile(r"(\w+)=(\S+)")
TEMPLATE = files("trl").joinpath("chat_templates/qwen3_instruct_2507.jinja").read_text(encoding="utf-8")
END = "<|im_end|>"


@dataclass(frozen=True)
class Line:
    """A line of a table: what the row was written for, the row, and what becomes of it."""

    heading: str
    habit: str
    row: str  # JSON
    outcome: str

    @property
    def settings(self) -> Settings:
        """The settings that its first cell names."""
        pairs = (SETTING.fullmatch(code) for code in CODE.findall(self.habit))
        return Settings(**{pair[1]: pair[2] for pair in pairs if pair})


def read_lines() -> list[Line]:
    """Return the lines of all tables that have a row."""
    heading, lines = "", []
    for text in (DOCS / "row-formats.md").read_text(encoding="utf-8").splitlines():
        if match := HEADING.match(text):
            heading = match[1]
        cells = text.removeprefix("| ").removesuffix(" |").split(" | ")
        if len(cells) > 2 and cells[1].startswith("`{"):
            lines.append(Line(heading, cells[0], cells[1].strip("`"), cells[2]))
    return lines


LINES = read_lines()
READ = [line for line in LINES if line.heading not in ("Fields", "Rows")]


def name_line(line: Line) -> str:
    return f"{line.heading}: {line.habit}"


def build_text_vocabulary(line: Line) -> Vocabulary:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None if "without a chat template" in line.heading else TEMPLATE
    return Vocabulary(tokenizer, frozenset({tokenizer.eos_token_id}), len(tokenizer))


def prepare(line: Line, folder):
    """Return the tokenizer, each row's trained tokens, the reasons of bad rows, and the fields that nothing reads."""
    file = folder / "rows.jsonl"
    file.write_text(line.row, encoding="utf-8")
    vocabulary = build_vocabulary("qwen", folder) if "image" in line.row else build_text_vocabulary(line)
    tokenizer = vocabulary.tokenizer
    draw(40, 30).save(folder / "cat.png")
    write_source(FileSource("train", folder, (file,)), vocabulary, line.settings.data, folder)
    rejected = map(json.loads, (folder / REJECTED_ROWS).read_text(encoding="utf-8").splitlines())
    report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    labels = [[one for one in row["labels"] if one != IGNORED] for row in Dataset.from_file(str(folder / ROWS))]
    return tokenizer, labels, [row["reason"] for row in rejected], report["unread_fields"]


def test_all_kinds_of_tables_are_found():
    assert len(READ) > 33
    assert len(LINES) - len(READ) > 12
    assert len({line.heading for line in LINES}) == 12


@pytest.mark.parametrize("line", READ, ids=name_line)
def test_what_is_read_is_trained_on_as_the_page_says(line, tmp_path):
    tokenizer, rows, reasons, _ = prepare(line, tmp_path)
    assert reasons == []
    (trained,) = rows
    if line.heading == "Tokens":
        assert line.outcome == f"`{' '.join(map(str, trained))}`"
    else:
        text = tokenizer.decode(trained).replace(f"{END}\n", END).replace(END, "⏹").replace("\n", "↵")
        assert line.outcome == f"`{text}`"


@pytest.mark.parametrize("line", [line for line in LINES if line.heading == "Fields"], ids=name_line)
def test_a_field_that_nothing_reads_is_told_and_the_row_is_trained_on(line, tmp_path):
    _, rows, reasons, unread = prepare(line, tmp_path)
    assert (len(rows), reasons) == (1, [])
    assert unread == {line.outcome.strip("`"): 1}


@pytest.mark.parametrize("line", [line for line in LINES if line.heading == "Rows"], ids=name_line)
def test_a_row_that_is_not_read_is_told_with_the_reason(line, tmp_path):
    _, rows, (reason,), _ = prepare(line, tmp_path)
    assert rows == []
    assert line.outcome.strip("`") in reason
