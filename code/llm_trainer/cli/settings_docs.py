# SPDX-License-Identifier: Apache-2.0
"""All settings and the rules between them as a person reads them: in `llm-trainer train --help` and in the documents.

`python -m llm_trainer.cli.settings_docs docs/settings.md` renews the tables between markers, such as
`<!-- rules -->` and `<!-- end of rules -->`. A test keeps them current.
"""

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from llm_trainer.aws.options import OPTIONS, format_option_default
from llm_trainer.aws.permissions import IMPLIED, PERMISSIONS
from llm_trainer.common.files import write_verbatim
from llm_trainer.config.checks import HARDWARE_RULES
from llm_trainer.config.load import describe_default, describe_rule
from llm_trainer.config.rules.methods import is_of_method
from llm_trainer.config.rules.rule import HardwareRule, Rule
from llm_trainer.config.rules.table import RULES
from llm_trainer.config.schema import FIELDS, OWN_NAMES, SECTIONS, show_value
from llm_trainer.config.sections import ALIASES, METHOD_FIELDS, OWN_DEFAULTS
from llm_trainer.config.trl_config_fields import CONFIG_CLASSES

PLACEHOLDER = re.compile(r"\{[^{}]*\}")


def list_own_names(section: str) -> list[str]:
    """Return the names of the project's own settings in a section, in their order."""
    return [name for name in SECTIONS[section].model_fields if name in OWN_NAMES]


def list_training_arguments() -> list[str]:
    """Return the names of the settings that are fields of trl.SFTConfig, and mean the same in every method."""
    return [name for name in FIELDS if name not in OWN_NAMES and name not in METHOD_FIELDS]


def format_settings(method: str = "sft") -> str:
    """Return a paragraph for each setting of a training method, as plain text for a terminal."""
    parts = ["Settings:", format_setting("config")]
    for section in SECTIONS:
        if names := list_own_names(section):
            parts += [f"\n{section.capitalize()}:", *map(format_setting, names)]
    own = [name for name, methods in METHOD_FIELDS.items() if method in methods]
    others = ", ".join(name for name in CONFIG_CLASSES if name != method)
    parts += [
        f"\nSettings of method={method} (`llm-trainer train --help --method NAME` lists those of {others}):",
        *(format_method_setting(name, method) for name in own),
        "\nFields of TRL's configs and transformers.TrainingArguments:",
        *(format_setting(name) for name in list_training_arguments() if is_of_method(name, method)),
        "\nOther spellings: " + ", ".join(f"{alias} = {name}" for alias, name in ALIASES.items()),
    ]
    return "\n".join(parts)


def format_setting(name: str) -> str:
    """Return two lines on a setting: its name with what it takes and its default, and its description."""
    field = FIELDS[name]
    default = describe_default(name) or "none"
    return f"  --{name}  ({describe_rule(field)}; default {default})\n      {field.description}"


def format_method_setting(name: str, method: str) -> str:
    """Return two lines on a setting that methods share by name alone, as one of them has it."""
    argument = METHOD_FIELDS[name][method]
    takes = f"one of {', '.join(argument.choices)}" if argument.choices else describe_rule(FIELDS[name])
    return f"  --{name}  ({takes}; default {show_value(argument.default)})\n      {argument.help}"


def format_method_settings() -> str:
    """Return a Markdown table with a row for each setting of a method, where methods do not have it alike."""
    rows = []
    for name, methods in METHOD_FIELDS.items():
        for method, argument in methods.items():
            takes = f"one of {', '.join(argument.choices)}" if argument.choices else describe_rule(FIELDS[name])
            rows.append((f"`{name}`", method, takes, f"`{show_value(argument.default)}`", argument.help))
    return format_table(("setting", "method", "takes", "default", "meaning"), rows)


def format_own_settings() -> str:
    """Return a Markdown table of the project's own settings for each section, below a heading."""
    tables = [format_settings_table(["config"])]
    tables += [
        f"### {section.capitalize()}\n\n{format_settings_table(list_own_names(section))}"
        for section in SECTIONS
        if list_own_names(section)
    ]
    return "\n".join(tables)


def format_settings_table(names: Iterable[str]) -> str:
    """Return a Markdown table with a row for each of these settings."""
    rows = []
    for name in names:
        field = FIELDS[name]
        default = describe_default(name)
        default = f"`{default}`" if default and name not in OWN_DEFAULTS else default
        rows.append((f"`{name}`", describe_rule(field), default, field.description or ""))
    return format_table(("setting", "takes", "default", "meaning"), rows)


def format_options() -> str:
    """Return a Markdown table of the options of a submission."""
    rows = []
    for name, field in OPTIONS.items():
        default = format_option_default(name)
        rows.append((f"`{name}`", describe_rule(field), f"`{default}`" if default else "", field.description or ""))
    return format_table(("option", "takes", "default", "meaning"), rows)


def format_option_list() -> str:
    """Return a paragraph for each option of a submission, as plain text for a terminal."""
    lines = ["Options:"]
    for name, field in OPTIONS.items():
        default = format_option_default(name) or "none"
        lines.append(f"  --{name}  ({describe_rule(field)}; default {default})\n      {field.description}")
    return "\n".join(lines)


def format_permissions() -> str:
    """Return a Markdown table of the IAM actions that the commands need, each once, and why."""
    rows = {each.action: (f"`{each.action}`", each.commands, each.reason) for each in (*PERMISSIONS.values(), *IMPLIED)}
    return format_table(("action", "for", "why"), sorted(rows.values()))


def format_rules(rules: Sequence[Rule | HardwareRule]) -> str:
    """Return a Markdown table of rules between settings, with three dots in place of the values that users give."""
    rows = []
    for rule in rules:
        names = ", ".join(f"`{name}`" for name in rule.settings)
        rows.append((names, PLACEHOLDER.sub("...", rule.message)))
    return format_table(("settings", "what the job says"), rows)


def format_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table with these titles of columns."""
    lines = [titles, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    table = [f"| {' | '.join(line)} |" for line in lines]
    table.insert(1, f"|{'---|' * len(titles)}")
    return "\n".join(table) + "\n"


def renew_tables(text: str) -> str:
    """Return the document with the current table between each pair of markers that it has."""
    for begin, end, table in (
        ("<!-- settings:own -->\n", "<!-- end of settings -->", format_own_settings()),
        (
            "<!-- settings:training arguments -->\n",
            "<!-- end of settings -->",
            format_settings_table(list_training_arguments()),
        ),
        ("<!-- settings:methods -->\n", "<!-- end of settings -->", format_method_settings()),
        ("<!-- rules -->\n", "<!-- end of rules -->", format_rules(RULES)),
        ("<!-- options -->\n", "<!-- end of options -->", format_options()),
        ("<!-- permissions -->\n", "<!-- end of permissions -->", format_permissions()),
        ("<!-- hardware rules -->\n", "<!-- end of rules -->", format_rules(HARDWARE_RULES)),
    ):
        if begin in text:
            before, rest = text.split(begin)
            text = f"{before}{begin}\n{table}\n{rest[rest.index(end) :]}"
    return text


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        write_verbatim(path, renew_tables(path.read_text(encoding="utf-8")))
