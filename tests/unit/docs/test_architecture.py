# SPDX-License-Identifier: Apache-2.0
"""docs/architecture.md shows the packages as they are, in the order that import-linter keeps."""

import re
import tomllib

from support.documents import DOCS, list_code, read_prose
from support.measures import CODE, ROOT

PAGE = DOCS / "architecture.md"
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
MODULE = re.compile(r"[a-z_]+(/[a-z_]+)*(\.py|/)")
OWN = re.compile(r"(bench|code|docker|docs|examples|tests|unit|integration|image|local_mode|notebook|codebuild|gpu)/.*")


def test_the_map_has_the_packages_in_their_order():
    rows = re.findall(r"^\| `([a-z]+)/` \|.* (yes|no) \|$", read_prose(PAGE), re.MULTILINE)
    (layers,) = [contract["layers"] for contract in CONTRACTS if contract["type"] == "layers"]
    assert [name for name, _ in rows] == layers[1:]  # the first layer is train and worker
    (free,) = [contract["source_modules"] for contract in CONTRACTS if "forbidden_modules" in contract]
    assert {f"llm_trainer.{name}" for name, torch in rows if torch == "no"} == set(free)


def test_every_module_that_it_names_is_there():
    named = [piece for piece in list_code(PAGE) if MODULE.fullmatch(piece) and not OWN.fullmatch(piece)]
    assert len(named) > 40
    elsewhere = {"lock.sh"}
    assert [name for name in named if name not in elsewhere and not (CODE / name).exists()] == []


def test_the_glossary_is_in_order():
    text = PAGE.read_text(encoding="utf-8").partition("## Glossary")[2].partition("\n## ")[0]
    words = re.findall(r"^\| ([a-z ]+) \|", text, re.MULTILINE)[1:]
    assert len(words) > 30
    assert words == sorted(words)
