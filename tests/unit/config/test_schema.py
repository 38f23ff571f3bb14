# SPDX-License-Identifier: Apache-2.0
"""Settings are given by flat names and read by section."""

import pytest
from pydantic import ValidationError

from llm_trainer.common.redaction import REDACTED
from llm_trainer.config.schema import (
    FIELDS,
    OWN_NAMES,
    SECTION_OF,
    SECTIONS,
    Settings,
    describe_settings,
    list_plain_types,
    show_value,
)


def test_flat_names_are_sorted_into_sections():
    settings = Settings(lora_r=4, learning_rate=1e-3, config="args.yaml")
    assert settings.adapter.lora_r == settings.value("lora_r") == 4
    assert settings.training.learning_rate == 1e-3
    assert settings.value("config") == settings.config == "args.yaml"
    assert settings.given == {"config": "args.yaml", "lora_r": 4, "learning_rate": 1e-3}


def test_a_default_that_was_given_counts_as_given():
    settings = Settings(lora_r=8)
    assert settings.is_given("lora_r")
    assert not settings.is_given("lora_alpha")
    assert not settings.is_given("config")


def test_an_unknown_name_is_refused():
    with pytest.raises(ValidationError, match="lora_rnak"):
        Settings(lora_rnak=8)


def test_a_copy_keeps_what_was_given():
    settings = Settings(lora_r=4, seed=1).replace(seed=2, packing=False)
    assert settings.given == {"lora_r": 4, "seed": 2, "packing": False}


def test_every_setting_is_in_one_section():
    names = [name for section in SECTIONS.values() for name in section.model_fields]
    assert len(set(names)) == len(names)
    assert list(FIELDS) == ["config", *names]
    assert SECTION_OF["lora_r"] == "adapter"
    assert "lora_r" in OWN_NAMES
    assert "adam_beta1" not in OWN_NAMES


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("lora_r", ({"int"}, False)),
        ("max_length", ({"int"}, True)),
        ("target_modules", ({"str", "list"}, False)),
        ("token", ({"str"}, True)),
        ("merge_base", ({"str"}, False)),
    ],
)
def test_plain_types(name, types):
    assert list_plain_types(name) == types


@pytest.mark.parametrize(("value", "text"), [(True, "true"), ("x", "'x'"), (2e-05, "2e-05"), ([1], "[1]")])
def test_values_are_shown_as_users_write_them(value, text):
    assert show_value(value) == text


def test_what_is_recorded_are_our_defaults_and_what_was_given_without_secrets():
    recorded = describe_settings(Settings(seed=1, token="hunter2", mlflow_uri="http://me:word@host"))
    assert recorded["seed"] == 1
    assert recorded["lora_r"] == 8
    assert "adam_beta1" not in recorded
    assert recorded["token"] == REDACTED
