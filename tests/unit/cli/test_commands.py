# SPDX-License-Identifier: Apache-2.0
"""The settings of a command line reach a command as they were written."""

import pytest

from llm_trainer.cli.commands import build_parser, list_commands, parse_command
from llm_trainer.job.job import parse_arguments

NEEDED = {  # of each command's arguments
    "merge": ["--adapter", "a", "--output", "b"],
    "deploy": ["job", "--instance_type", "ml.g6.2xlarge"],
    "invoke": ["endpoint", "Hi"],
    **{name: ["name"] for name in ("watch", "fetch", "stop", "delete")},
}
WORDS = ["--lora-r", "8", "--use_dora", "--run_name=-h-", "--learning_rate=1e-4", "--seed", "-5", "--run_name", "a b"]


@pytest.mark.parametrize("name", ["train", "validate", "plan", "doctor", "submit"])
def test_settings_stay_as_they_were_written(name):
    asked = parse_command([name, *WORDS])
    assert asked.settings == WORDS
    assert parse_arguments(asked.settings) == {
        "lora_r": "8",
        "use_dora": "true",
        "learning_rate": "1e-4",
        "seed": "-5",
        "run_name": "a b",
    }


@pytest.mark.parametrize("name", ["validate", "plan"])
def test_json_is_no_setting_wherever_it_stands(name):
    asked = parse_command([name, "--lora_r", "8", "--json", "--use_dora"])
    assert asked.json
    assert asked.settings == ["--lora_r", "8", "--use_dora"]
    assert not parse_command([name]).json


@pytest.mark.parametrize("name", ["train", "doctor"])
def test_commands_without_json_leave_it_to_the_settings(name):
    assert parse_command([name, "--json"]).settings == ["--json"]


def test_stray_words_are_left_to_the_settings_which_refuse_them():
    assert parse_command(["train", "stray", "--", "-x"]).settings == ["stray", "--", "-x"]


def test_the_list_of_commands_is_that_of_the_parser():
    assert f"COMMAND\n    {list_commands()[0]} " in build_parser().format_help()
    for name in list_commands():
        arguments = NEEDED.get(name, [])
        assert callable(parse_command([name, *arguments]).run)


def test_the_arguments_of_merge():
    asked = parse_command(["merge", "--adapter", "a", "--output=b", "--merge_base", "dequantized"])
    assert (asked.adapter, asked.output, asked.base, asked.merge_base) == ("a", "b", None, "dequantized")
    assert (asked.dtype, asked.model_revision, asked.trust_remote_code) == ("auto", None, "false")


def test_the_options_of_plan_take_their_values_and_leave_the_settings():
    words = [
        "--rows",
        "10",
        "--lora_r",
        "8",
        "--learn",
        "a.json",
        "b.json",
        "--tokens-per-row=5",
        "--images-per-row=1x64x64",
        "--use_dora",
        "--prices",
    ]
    asked = parse_command(["plan", *words])
    assert asked.images_per_row == "1x64x64"
    assert (asked.rows, asked.tokens_per_row, asked.prices, asked.learn) == (10, 5, True, ["a.json", "b.json"])
    assert asked.settings == ["--lora_r", "8", "--use_dora"]
