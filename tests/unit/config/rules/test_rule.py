# SPDX-License-Identifier: Apache-2.0
"""A rule says what is wrong with the values that the user gave."""

from llm_trainer.config.rules.rule import Rule, format_message
from llm_trainer.config.schema import Settings


def test_values_stand_in_the_message_as_users_write_them():
    settings = Settings(use_dora=True, target_modules=["q", "v"], optim="lomo", train_weights={"a": 1.0})
    message = "{use_dora} {use_dora!r} {target_modules!r} {optim} {optim!r} {train_weights} {mlflow_uri} {own!r} {{}}"
    shown = format_message(message, settings, {"own": "x"})
    assert shown == "true true ['q', 'v'] lomo 'lomo' {\"a\": 1.0} null 'x' {}"


def test_a_value_of_the_rule_wins_over_the_setting():
    assert format_message("{lora_r}", Settings(lora_r=4), {"lora_r": 5}) == "5"


def test_a_rule_that_holds_says_nothing():
    rule = Rule(("lora_r",), lambda s: s.adapter.lora_r > 8, "lora_r={lora_r:g} is large")
    assert rule.find_problems(Settings(lora_r=8)) == []
    assert rule.find_problems(Settings(lora_r=16)) == ["lora_r=16 is large"]


def test_a_rule_says_a_sentence_for_each_set_of_values():
    rule = Rule(("lora_r",), lambda s: True, "{part}", lambda s: ({"part": part} for part in ("a", "b")))
    assert rule.find_problems(Settings()) == ["a", "b"]
