# SPDX-License-Identifier: Apache-2.0
"""A job is read whole or refused with every mistake, and its command line is read as people write one."""

import pytest

from llm_trainer.common.errors import UserError
from llm_trainer.job.job import parse_arguments, read_job


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ([], {}),
        (["--lora_r", "8"], {"lora_r": "8"}),
        (["--lora-r=8"], {"lora_r": "8"}),
        (["--packing", "--lora_r", "8"], {"packing": "true", "lora_r": "8"}),
        (["--packing"], {"packing": "true"}),
        (["--run_name=a=b"], {"run_name": "a=b"}),
        (["--run_name="], {"run_name": ""}),
        (["--learning_rate", "-1"], {"learning_rate": "-1"}),
        (["--seed", "1", "--seed", "2"], {"seed": "2"}),
    ],
)
def test_words_become_settings(words, values):
    assert parse_arguments(words) == values


def test_a_word_in_the_place_of_a_key_is_refused():
    with pytest.raises(UserError, match=r"^Argument 'lora_r' is not of the form --key value"):
        parse_arguments(["--seed", "1", "lora_r", "8"])


def test_a_job_is_what_its_tree_and_command_line_say(tree, monkeypatch):
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tree.base_dir))
    job = read_job(["--lora_r", "2"])
    assert job.settings.adapter.lora_r == 2
    assert job.settings.data.max_length
    assert job.inputs.model == str(tree.base_dir / "input/data/model")
    assert job.environment.current_host == "algo-1"


def test_every_mistake_is_told_at_once(tree, monkeypatch):
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tree.base_dir))
    tree.change(lora_rnak="8")
    (tree.base_dir / "input/data/model/model.safetensors").unlink()
    with pytest.raises(UserError) as refusal:
        read_job(["lora_r"])
    problems = refusal.value.problems
    assert [any(word in problem for problem in problems) for word in ("'lora_r'", "lora_rnak", "weights")] == [True] * 3
