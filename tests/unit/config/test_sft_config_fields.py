# SPDX-License-Identifier: Apache-2.0
"""What is generated is current, and every field of SFTConfig is a setting."""

import dataclasses
import json
from pathlib import Path

from trl import SFTConfig

from llm_trainer.cli.settings_docs import as_help, renew_tables
from llm_trainer.config.schema import FIELDS
from llm_trainer.config.sections import ALIASES
from llm_trainer.config.sft_config_fields import NOT_SETTINGS, SNAPSHOT, take_snapshot

REPOSITORY = Path(__file__).parents[3]


def test_the_snapshot_is_that_of_the_pinned_trl():
    assert json.loads(SNAPSHOT.read_text()) == json.loads(json.dumps(take_snapshot()))


def test_every_field_of_sftconfig_is_a_setting():
    names = {field.name for field in dataclasses.fields(SFTConfig)} - set(NOT_SETTINGS)
    assert names <= set(FIELDS) | set(ALIASES)


def test_help_names_every_setting():
    text = as_help()
    assert all(f"--{name} " in text for name in FIELDS)
    assert all(alias in text for alias in ALIASES)


def test_the_readmes_tables_are_current():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert "`lora_r`" in readme
    assert "`adam_beta1`" in readme
    assert renew_tables(readme) == readme
