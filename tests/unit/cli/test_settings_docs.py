# SPDX-License-Identifier: Apache-2.0
"""Help and documents name every setting and every rule, and are current."""

from pathlib import Path

import pytest

from llm_trainer.aws.options import OPTIONS
from llm_trainer.cli.settings_docs import (
    format_option_list,
    format_own_settings,
    format_rules,
    format_settings,
    list_own_names,
    list_training_arguments,
    renew_tables,
)
from llm_trainer.config.checks import HARDWARE_RULES
from llm_trainer.config.rules.table import RULES
from llm_trainer.config.schema import FIELDS, SECTIONS
from llm_trainer.config.sections import ALIASES, METHOD_FIELDS
from llm_trainer.config.trl_config_fields import CONFIG_CLASSES

DOCS = Path(__file__).parents[3] / "docs"
DOCUMENT = DOCS / "settings.md"


def test_help_names_every_setting():
    texts = [format_settings(method) for method in CONFIG_CLASSES]
    assert all(any(f"  --{name}  (" in text for text in texts) for name in FIELDS)
    text = texts[0]
    assert all(f"{alias} = {name}" in text for alias, name in ALIASES.items())


def test_help_names_every_option_of_a_submission():
    text = format_option_list()
    assert all(f"  --{name}  (" in text for name in OPTIONS)


def test_each_setting_stands_in_one_table():
    own = [name for section in SECTIONS for name in list_own_names(section)]
    assert sorted(["config", *own, *METHOD_FIELDS, *list_training_arguments()]) == sorted(FIELDS)


def test_help_on_a_method_lists_what_it_has():
    sft, dpo = format_settings("sft"), format_settings("dpo")
    assert "  --loss_type  (one of nll, dft, chunked_nll; default 'nll')" in sft
    assert "  --beta  (a number or null, at least 0; default 0.1)" in dpo
    assert "--beta" not in sft
    assert "--assistant_only_loss" in sft
    assert "--completion_only_loss" not in dpo


def test_own_settings_stand_below_the_headings_of_their_sections():
    text = format_own_settings()
    headings = [line.removeprefix("### ") for line in text.splitlines() if line.startswith("#")]
    assert headings == ["Model", "Adapter", "Data", "Methods", "Training", "Parallelism", "Tracking", "Output"]
    adapter = text.partition("### Adapter")[2].partition("### ")[0]
    assert "| `lora_r` | a whole number, at least 1 | `8` |" in adapter
    assert "`model_id`" not in adapter


def test_every_rule_is_listed_with_dots_for_values():
    table = format_rules(RULES)
    assert len(table.splitlines()) == len(RULES) + 2
    row = "init_lora_weights=orthogonal with lora_r=...: the rank must be even; add 1."
    assert f"| `init_lora_weights`, `lora_r` | {row} |" in table
    assert "{" not in table
    assert "this host's ... GPUs" in format_rules(HARDWARE_RULES)


def test_tables_are_renewed_between_their_markers():
    text = (
        "before\n<!-- rules -->\nstale\n<!-- end of rules -->\nafter\n<!-- hardware rules -->\n<!-- end of rules -->\n"
    )
    renewed = renew_tables(text)
    assert renewed.startswith("before\n<!-- rules -->\n\n| settings |")
    assert "stale" not in renewed
    assert format_rules(RULES) in renewed
    assert format_rules(HARDWARE_RULES) in renewed
    assert "<!-- end of rules -->\nafter\n" in renewed
    assert renew_tables(renewed) == renewed


@pytest.mark.parametrize("name", ["settings.md", "submitting.md"])
def test_the_tables_of_a_document_are_current(name):
    text = (DOCS / name).read_text(encoding="utf-8")
    assert renew_tables(text) == text


def test_the_document_has_every_setting():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in FIELDS)
