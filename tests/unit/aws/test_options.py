# SPDX-License-Identifier: Apache-2.0
"""Options of a submission are read as settings are, and every mistake is one sentence."""

import pytest

from llm_trainer.aws.options import OPTIONS, find_secrets, format_option_default, read_options
from llm_trainer.config.load import list_valid_names

GIVEN = {"image": "trainer:cuda", "role": "Trainer", "output": "s3://bucket/output", "instance_type": "ml.g6.2xlarge"}


def read(**given):
    problems: list[str] = []
    return read_options({**GIVEN, **given}, problems), problems


def test_options_come_from_yaml_and_as_words():
    options, problems = read(
        spot="true", instance_count="2", tags='{"team": "nlp"}', subnets="a,b", security_groups=["c"]
    )
    assert problems == []
    assert (options.spot, options.instance_count, options.tags) == (True, 2, {"team": "nlp"})
    assert (options.subnets, options.security_groups) == (["a", "b"], ["c"])


def test_numbers_in_variables_and_tags_are_texts():
    options, problems = read(environment={"NCCL_NSOCKS_PERTHREAD": 4}, tags={"cost-center": 1234})
    assert (options.environment, options.tags) == ({"NCCL_NSOCKS_PERTHREAD": "4"}, {"cost-center": "1234"})
    assert problems == []


def test_no_option_has_the_name_of_a_setting():
    assert not OPTIONS.keys() & set(list_valid_names())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"instance_count": 0}, "instance_count=0 is not valid: it must be a whole number, at least 1"),
        ({"volume_gb": True}, "volume_gb=True is not valid"),
        ({"keep_alive_seconds": 99999}, "keep_alive_seconds=99999 is not valid"),
        ({"instance_typ": "x"}, "the nearest valid name is 'instance_type'"),
        ({"image": None}, "image is missing"),
        ({"role": None}, "role is missing"),
        ({"output": "bucket/output"}, "output='bucket/output' is no S3 prefix"),
        ({"role": "a role"}, "role='a role' is neither"),
        ({"name": "my_job"}, "name='my_job' is no job's name"),
        ({"name": "a" * 64}, "at most 63"),
        ({"instance_type": None}, "Either instance_type or instance_preferences"),
        ({"instance_preferences": {"ml.p5.48xlarge": 1}}, "Either instance_type or instance_preferences"),
        ({"spot": True, "keep_alive_seconds": 60}, "spot=true and keep_alive_seconds exclude"),
        ({"max_wait_seconds": 60}, "is for spot=true alone"),
        ({"subnets": ["subnet-1"]}, "belong together"),
        ({"channels": {"train": "s3:/bucket"}}, "train='s3:/bucket'"),
        ({"environment": {"HF_TOKEN": "hf_" + "aB3" * 12}}, "HF_TOKEN holds a secret"),
        ({"tags": {"password": "correct-horse-7"}}, "password holds a secret"),
    ],
)
def test_a_mistake_is_one_sentence(given, words):
    _, problems = read(**given)
    (problem,) = problems
    assert words in problem
    assert "correct-horse" not in problem and "aB3" not in problem


def test_preferences_exclude_spot():
    _, problems = read(
        instance_type=None, instance_preferences='{"ml.p5.48xlarge": 1, "ml.p4d.24xlarge": 2}', spot=True
    )
    assert ["instance_preferences exclude" in problem for problem in problems] == [True]


def test_the_arn_of_a_secret_is_none():
    arn = "arn:aws:secretsmanager:us-west-2:123456789012:secret:hub-AbCdEf"
    assert list(find_secrets({"HF_TOKEN": arn, "token": None, "lora_r": "8"}, "environment")) == []
    assert list(find_secrets({"mlflow_uri": "https://me:correct-horse-7@host"}, "hyperparameters"))


def test_defaults_are_written_as_users_write_them():
    assert [format_option_default(name) for name in ("spot", "volume_gb", "role", "tags")] == ["false", "100", "", ""]
