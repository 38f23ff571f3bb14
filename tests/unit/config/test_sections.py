# SPDX-License-Identifier: Apache-2.0
"""Sections are frozen, know what the user gave, and hold SFTConfig's fields with its types."""

import pytest
from pydantic import SecretStr, ValidationError

from llm_trainer.config.schema import SECTIONS
from llm_trainer.config.sections import (
    ALIASES,
    METHOD_FIELDS,
    AdapterSettings,
    DataSettings,
    OutputSettings,
    TrainingSettings,
    build_field,
    list_remaining_fields,
)
from llm_trainer.config.trl_config_fields import CONFIG_CLASSES, read_snapshot


def test_a_section_knows_what_the_user_gave():
    section = AdapterSettings(lora_r=8)
    assert section.is_given("lora_r")
    assert section.is_given("lora_alpha", "lora_r")
    assert not section.is_given("lora_alpha")
    assert section.value("lora_alpha") == 16


def test_a_section_is_frozen_and_takes_no_other_name():
    with pytest.raises(ValidationError):
        AdapterSettings().lora_r = 4  # type: ignore[misc]
    with pytest.raises(ValidationError):
        AdapterSettings(learning_rate=1)


def test_fields_of_sftconfig_follow_the_sections_own():
    assert DataSettings.trl_config_fields[0] == "completion_only_loss"
    assert next(iter(DataSettings.model_fields)) == "method"
    assert list(DataSettings.model_fields)[-1] == "dataset_kwargs"
    assert AdapterSettings.trl_config_fields == ()
    assert DataSettings.__doc__.startswith("The rows")


def test_every_field_of_sftconfig_is_in_one_section_or_replaced_by_a_setting():
    taken = [name for section in SECTIONS.values() for name in section.trl_config_fields]
    assert len(set(taken)) == len(taken)
    own = {name for section in SECTIONS.values() for name in section.model_fields} - set(taken)
    for method in CONFIG_CLASSES:
        assert set(read_snapshot(method)) <= set(taken) | own | set(ALIASES)
    assert set(taken) == {*read_snapshot(), *METHOD_FIELDS} & set(taken)
    assert list_remaining_fields(*SECTIONS.values()) == []


def test_ranges_and_secrets_are_ours():
    assert build_field("hub_token")[0] == SecretStr | None
    assert OutputSettings(hub_token="x").hub_token.get_secret_value() == "x"
    with pytest.raises(ValidationError):
        TrainingSettings(learning_rate=0)


def test_descriptions_are_whole_sentences():
    for section in SECTIONS.values():
        for name in set(section.model_fields) - set(section.trl_config_fields):
            description = section.model_fields[name].description
            assert description[0].isupper(), name
            assert description.endswith("."), name
