# SPDX-License-Identifier: Apache-2.0
"""Secrets behind ARNs, asked for with the real boto3 of a server that plays AWS."""

import json

import pytest

from llm_trainer.common.errors import UserError
from llm_trainer.config.environment import read_environment
from llm_trainer.config.schema import Settings
from llm_trainer.config.secret_references import HUB_TOKEN, USED_FOR, WITHHELD, read_secret_variables, withhold_secrets
from llm_trainer.job.inputs import find_inputs, find_warnings
from support.fake_aws import FakeAWS

SECRET = "arn:aws:secretsmanager:eu-west-1:111122223333:secret:team/token-AbCdEf"
OTHER = "arn:aws-cn:secretsmanager:cn-north-1:111122223333:secret:other"
PARAMETER = "arn:aws:ssm:us-east-2:111122223333:parameter/team/token"


@pytest.fixture
def aws(monkeypatch):
    aws = FakeAWS()
    for name, value in aws.variables.items():
        monkeypatch.setenv(name, value)
    yield aws
    aws.server.shutdown()


def refuse(variables, settings=None) -> str:
    with pytest.raises(UserError) as refusal:
        read_secret_variables((settings or Settings()).secrets, variables)
    return str(refusal.value)


def test_settings_and_variables_of_either_service_and_any_region(aws):
    aws.values = {SECRET: "hf_1", OTHER: "key\n", PARAMETER: "word"}
    settings = Settings(token=SECRET, hub_token="hf_plain")
    given = {"HF_TOKEN": "loses", "WANDB_API_KEY": OTHER, "MLFLOW_TRACKING_PASSWORD": PARAMETER, "HOME": "/root"}
    assert read_secret_variables(settings.secrets, given) == {
        "HF_TOKEN": "hf_1",
        "WANDB_API_KEY": "key",
        HUB_TOKEN: "hf_plain",
        "MLFLOW_TRACKING_PASSWORD": "word",
    }
    assert aws.requests == [SECRET, OTHER, PARAMETER]
    assert aws.regions == ["eu-west-1", "cn-north-1", "us-east-2"]


def test_plain_values_ask_nobody(aws):
    assert read_secret_variables(Settings(wandb_token="key").secrets, {"HF_TOKEN": "hf_1"}) == {
        "HF_TOKEN": "hf_1",
        "WANDB_API_KEY": "key",
    }
    assert read_secret_variables(Settings().secrets, {}) == {}
    assert aws.requests == []


@pytest.mark.parametrize(
    ("fields", "value"), [({"HF_TOKEN": "hf_1", "other": "no"}, "hf_1"), ({"whatever": "hf_1"}, "hf_1")]
)
def test_a_json_object_gives_the_value_of_the_variable_or_its_only_one(aws, fields, value):
    aws.values[SECRET] = json.dumps(fields)
    assert read_secret_variables(Settings().secrets, {"HF_TOKEN": SECRET}) == {"HF_TOKEN": value}


@pytest.mark.parametrize("fields", [{"a": "hf_1", "b": "hf_2"}, {"HF_TOKEN": 7}, {}])
def test_another_json_object_is_refused_without_its_values(aws, fields):
    aws.values[SECRET] = json.dumps(fields)
    reason = refuse({"HF_TOKEN": SECRET})
    assert f"HF_TOKEN refers to {SECRET}, a JSON object with the keys" in reason
    assert reason.endswith("HF_TOKEN.")
    assert not any(str(value) in reason for value in fields.values())


@pytest.mark.parametrize("text", ["{", '{"HF_TOKEN": "hf_secret"', '{"a":' * 5_000, '{"a": "hf_secret\\u0000"}'])
def test_a_broken_json_object_is_no_token(aws, text):
    aws.values[SECRET] = text
    reason = refuse({"HF_TOKEN": SECRET})
    assert f"HF_TOKEN refers to {SECRET}, a JSON object that " in reason
    assert "hf_secret" not in reason


def test_all_that_cannot_be_read_is_told_at_once_with_what_to_allow(aws):
    aws.refusals = {SECRET: "AccessDeniedException", PARAMETER: "AccessDeniedException"}
    reason = refuse({"HF_TOKEN": SECRET, "WANDB_API_KEY": OTHER}, Settings(hub_token=PARAMETER))
    role = "which may not be read: allow the job's role"
    assert f"HF_TOKEN refers to {SECRET}, {role} secretsmanager:GetSecretValue, and kms:Decrypt" in reason
    assert f"hub_token refers to {PARAMETER}, {role} ssm:GetParameter, and kms:Decrypt" in reason
    assert f"WANDB_API_KEY refers to {OTHER}, which does not exist: check name, account and region." in reason


def test_bytes_and_other_errors(aws):
    aws.values[SECRET] = {"SecretBinary": "aGZfMQ=="}
    assert refuse({"HF_TOKEN": SECRET}).endswith("which holds bytes and no text: store the value as SecretString.")
    aws.refusals[SECRET] = "DecryptionFailure"
    assert "which could not be read (DecryptionFailure" in refuse({"HF_TOKEN": SECRET})


@pytest.mark.parametrize(
    "arn", ["arn:aws:s3:::bucket/token", "arn:aws:ssm:us-east-2:111122223333:document/token", "arn:aws:secretsmanager"]
)
def test_another_arn_is_a_mistake(aws, arn):
    assert refuse({"HF_TOKEN": arn}).startswith(f"HF_TOKEN={arn!r} is the ARN of neither")
    assert aws.requests == []


def test_without_a_network_or_credentials(aws, monkeypatch):
    aws.server.shutdown()
    aws.server.server_close()
    assert "secretsmanager in eu-west-1 cannot be reached" in refuse({"HF_TOKEN": SECRET})
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    reason = refuse({"HF_TOKEN": SECRET})
    assert "there are no AWS credentials here: run under a role that is allowed secretsmanager:GetSecretValue" in reason


def test_only_a_value_among_the_settings_can_be_read_by_others(tree, monkeypatch):
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tree.base_dir))
    environment, settings = read_environment(), Settings(token=SECRET, wandb_token="key")
    oddities = list(find_warnings(settings, environment, find_inputs(settings, environment)[0]))
    assert [text for text in oddities if "can read" in text] == [
        "everyone who may describe the job can read wandb_token: give it in the job's Environment, or the ARN of a "
        "Secrets Manager secret in its place."
    ]


@pytest.mark.parametrize("uses", [[], ["hub"], ["wandb"], ["mlflow", "push"]])
def test_a_process_gets_only_the_secrets_that_it_uses(uses):
    given = {name: f"value of {name}" for names in USED_FOR.values() for name in names} | {"MY_API_KEY": "mine"}
    kept = withhold_secrets(given, uses)
    assert kept["MY_API_KEY"] == "mine"
    for use, names in USED_FOR.items():
        for name in names:
            withheld = WITHHELD if use == "wandb" else None
            assert kept.get(name) == (given[name] if use in uses else withheld)


def test_no_variable_is_made_up():
    assert withhold_secrets({"HOME": "/root"}, []) == {"HOME": "/root"}
