# SPDX-License-Identifier: Apache-2.0
"""The repository's documents, taken apart: blocks of code with their marks, links, headings and pieces of code."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support.measures import ROOT

DOCS = ROOT / "docs"
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted(DOCS.glob("*.md")),
    ROOT / "examples/infrastructure/README.md",
]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- (run|needs): ([^>]+) -->\n$")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of code, and the mark on the line before it."""

    document: Path
    line: int  # the number of its first line, from 1
    language: str
    text: str
    mark: str  # "run", "needs", or "" where there is none
    value: str  # what the mark names

    @property
    def place(self) -> str:
        """The document and line, for a message."""
        return f"{self.document.relative_to(ROOT)}:{self.line}"

    def list_commands(self) -> list[str]:
        """Return the commands, without comments, variables that are set before them, and continued lines."""
        joined = self.text.replace("\\\n", " ")
        lines = [re.sub(r"(^|\s)#.*$", "", line).strip() for line in joined.splitlines()]
        return [re.sub(r"^([A-Z_]+=\S+ +)+", "", line) for line in lines if line]


def read_blocks(document: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a document, in their order."""
    text = document.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        mark = MARK.search(text, 0, match.start())
        kind, value = mark.groups() if mark else ("", "")
        line = text.count("\n", 0, match.start()) + 2
        yield Block(document, line, match[1], match[2], kind, value)


def read_prose(document: Path) -> str:
    """Return the text of a document without blocks of code and comments."""
    return COMMENT.sub("", FENCE.sub("", document.read_text(encoding="utf-8")))


def list_links(document: Path) -> list[str]:
    """Return the targets of a document's links and pictures."""
    return LINK.findall(CODE.sub("", read_prose(document)))


def list_code(document: Path) -> list[str]:
    """Return the pieces of code within a document's sentences and tables."""
    return CODE.findall(read_prose(document))


def list_anchors(document: Path) -> set[str]:
    """Return the anchors of a document's headings, as MkDocs and GitHub make them."""
    headings = HEADING.findall(read_prose(document))
    plain = (re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings)
    return {re.sub(r"\s+", "-", heading) for heading in plain}
