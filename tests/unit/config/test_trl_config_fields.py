# SPDX-License-Identifier: Apache-2.0
"""The snapshot is current, and every field of SFTConfig is a setting."""

import dataclasses
import json

from trl import SFTConfig

from llm_trainer.config.schema import FIELDS
from llm_trainer.config.sections import ALIASES
from llm_trainer.config.trl_config_fields import NOT_SETTINGS, SNAPSHOT, take_snapshot


def test_the_snapshot_is_that_of_the_pinned_trl():
    assert json.loads(SNAPSHOT.read_text()) == json.loads(json.dumps(take_snapshot()))


def test_every_field_of_sftconfig_is_a_setting():
    names = {field.name for field in dataclasses.fields(SFTConfig)} - set(NOT_SETTINGS)
    assert names <= set(FIELDS) | set(ALIASES)
