# SPDX-License-Identifier: Apache-2.0
"""All settings as a person reads them: `llm-trainer train --help`, and the tables in the documentation.

`python -m llm_trainer.cli.settings_docs README.md examples/settings.md` renews the tables; a test keeps them current.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from llm_trainer.config.load import describe_rule
from llm_trainer.config.schema import FIELDS, OWN_NAMES, show_value
from llm_trainer.config.sections import ALIASES

BEGIN, END = "<!-- settings:{} -->\n", "<!-- end of settings -->"


def own_names() -> list[str]:
    return list(OWN_NAMES)


def training_argument_names() -> list[str]:
    return [name for name in FIELDS if name not in OWN_NAMES]


def as_help() -> str:
    """Plain text for a terminal."""
    parts = [
        "usage: llm-trainer train [--SETTING VALUE ...]",
        "Settings also come as hyperparameters, and from a YAML file (channel `config`, or config=PATH); "
        "the command line wins, then hyperparameters, then the file.",
        "Settings:",
        *map(describe_setting, own_names()),
        "\nFields of trl.SFTConfig and transformers.TrainingArguments:",
        *map(describe_setting, training_argument_names()),
        "\nOther spellings: " + ", ".join(f"{alias} = {name}" for alias, name in ALIASES.items()),
    ]
    return "\n".join(parts)


def describe_setting(name: str) -> str:
    field = FIELDS[name]
    return f"  --{name}  ({describe_rule(field)}; default {show_value(field.default)})\n      {field.description}"


def as_markdown(names: Iterable[str]) -> str:
    rows = ["| setting | takes | default | meaning |", "|---|---|---|---|"]
    for name in names:
        field = FIELDS[name]
        default = "" if field.default is None else f"`{show_value(field.default)}`"
        cells = (f"`{name}`", describe_rule(field), default, field.description or "")
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def renew_tables(text: str) -> str:
    """The document with each marked table replaced by the current one."""
    for kind, names in (("own", own_names()), ("training arguments", training_argument_names())):
        begin = BEGIN.format(kind)
        if begin in text:
            before, rest = text.split(begin)
            text = before + begin + "\n" + as_markdown(names) + "\n" + rest[rest.index(END) :]
    return text


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(renew_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
