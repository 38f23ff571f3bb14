# SPDX-License-Identifier: Apache-2.0
"""Every block of commands in the documents is run by a test, or says what it needs. CONTRIBUTING.md has the marks."""

import ast
import builtins
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llm_trainer.aws.options import OPTIONS
from llm_trainer.cli.commands import list_commands
from llm_trainer.config.schema import FIELDS
from support.documents import DOCUMENTS, Block, list_code, read_blocks
from support.measures import ROOT

SHELL = ("bash", "console", "sh", "shell")
NEEDS = {"aws", "gpu", "docker", "network"}
BLOCKS = [block for document in DOCUMENTS for block in read_blocks(document)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
COMMANDS = [block for block in BLOCKS if block.language in SHELL]
HERE = [block for block in COMMANDS if (block.mark, block.value) == ("run", "here")]
RULE = re.compile(r"^([a-z-]+):(?!=).*\n(?:(?:\t|ifeq|else|endif).*\n)*", re.MULTILINE)
RULES = {match[1]: match[0] for match in RULE.finditer((ROOT / "Makefile").read_text(encoding="utf-8"))}
OF_MAKE = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
LOOKS_LIKE_A_COMMAND = re.compile(r"^(\$ |make |docker |llm-trainer |pip |aws |\.venv/)", re.MULTILINE)


def test_there_are_commands():
    assert len(COMMANDS) > 15
    assert len(HERE) >= 5


def test_each_block_is_run_or_says_what_it_needs():
    unmarked = [block.place for block in BLOCKS if block.language in (*SHELL, "python") and not block.mark]
    assert unmarked == []
    unknown = [f"{block.place} {block.value}" for block in BLOCKS if block.mark == "needs" and block.value not in NEEDS]
    assert unknown == []


def test_no_command_hides_in_a_block_without_a_language():
    assert [b.place for b in BLOCKS if not b.language and LOOKS_LIKE_A_COMMAND.search(b.text)] == []


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.mark == "run" and b.value != "here"], ids=lambda b: b.place)
def test_what_a_mark_names_runs_the_commands(block):
    text = read_runner(block.value)
    for command in block.list_commands() if block.language in SHELL else []:
        for word in find_key_words(command):
            assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text), (command, word, block.value)


def read_runner(name: str) -> str:
    """Return what a mark names: a file's text, or a make target's rule with what the rule calls."""
    if not name.startswith("make "):
        files = [ROOT / name, (ROOT / name).with_name("conftest.py")]  # whose fixtures run programs
        return "\n".join(file.read_text(encoding="utf-8") for file in files if file.exists())
    return "\n".join(read_rules(name.removeprefix("make "), set()))


def read_rules(target: str, seen: set[str]) -> list[str]:
    """Return a target's rule, those of the targets that it needs, and the files of the tests that it runs."""
    seen.add(target)
    rule = RULES[target]
    texts = [rule]
    for folder in re.findall(r"tests/[a-z_]+", rule):
        texts += [file.read_text(encoding="utf-8") for file in (ROOT / folder).rglob("*.py")]
    if "buildspec.yml" in rule:
        texts.append((ROOT / "buildspec.yml").read_text(encoding="utf-8"))
    needed = [word for word in rule.partition("\n")[0].split("##")[0].split() if word in RULES]
    for name in needed:
        texts += [] if name in seen else read_rules(name, seen)
    return texts


def find_key_words(command: str) -> list[str]:
    """Return the words that tell which command this is: make's targets, our own command's name, or the program."""
    words = command.split()
    if words[0] == "make":
        return [word for word in words[1:] if "=" not in word]
    if words[0].endswith("llm-trainer"):
        return [words[1]]
    ours = [word for word in words[1:] if word in list_commands()]  # of `docker run IMAGE validate`
    return [Path(words[0]).name, *ours]


@pytest.fixture(scope="module")
def place(make_tree, tmp_path_factory):
    """A folder like the repository's, with a job of a tiny model in job/. What is written to docs/ goes to a copy."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("Makefile", "README.md", "code", "docker", "examples", "pyproject.toml", "tests"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "docs", folder / "docs")
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "job").symlink_to(make_tree().base_dir)
    return folder


@pytest.mark.parametrize("block", HERE, ids=lambda block: block.place)
def test_a_block_that_is_run_here_succeeds(block: Block, place: Path):
    variables = {name: value for name, value in os.environ.items() if name not in OF_MAKE}
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=place,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.place)
def test_a_python_block_says_where_its_names_come_from(block: Block):
    nodes = list(ast.walk(ast.parse(block.text)))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    bound = {node.id for node in names if isinstance(node.ctx, ast.Store)} | set(dir(builtins))
    bound |= {node.asname or node.name for node in nodes if isinstance(node, ast.alias)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    assert [node.id for node in names if node.id not in bound] == []


def test_every_make_target_is_there():
    pieces = [(d, piece) for d in DOCUMENTS for piece in list_code(d)]
    pieces += [(block.document, command) for block in COMMANDS for command in block.list_commands()]
    named = {
        (document.name, word)
        for document, piece in pieces
        if piece.startswith("make ")
        for word in find_key_words(piece)
        if re.fullmatch(r"[a-z-]+", word)
    }
    assert [name for name in sorted(named) if name[1] not in RULES] == []


def test_every_command_and_option_of_ours_is_there():
    pieces = [(d, piece) for d in DOCUMENTS for piece in list_code(d)]
    pieces += [(block.document, command) for block in COMMANDS for command in block.list_commands()]
    options = {"help", "version", "json", "adapter", "output", "base", "dtype", "data-dir", "output-dir"}
    options |= {"dry-run", "max-dollars", "max_tokens", "name", "reward", *OPTIONS}
    options |= {"prices", "prices-file", "region", "rows", "tokens-per-row", "images-per-row", "learn"}
    wrong = []
    for document, piece in pieces:
        words = piece.split()
        if len(words) < 2 or not words[0].endswith("llm-trainer"):
            continue
        if not (words[1].startswith("-") or words[1] in (*list_commands(), "COMMAND")):
            wrong.append((document.name, piece))
        names = {word[2:] for word in words if word.startswith("--")}
        wrong += [(document.name, name) for name in sorted(names) if name not in FIELDS and name not in options]
    assert wrong == []
