# SPDX-License-Identifier: Apache-2.0
"""CreateTrainingJob's arguments, held against the API's own model."""

import json
import re

import botocore.session
import pytest
from botocore.validate import ParamValidator

from llm_trainer.aws.options import JobOptions
from llm_trainer.aws.submission import (
    Submission,
    build_request,
    choose_name,
    define_job_metrics,
    encode_settings,
    find_request_problems,
)

IMAGE = "123456789012.dkr.ecr.us-west-2.amazonaws.com/trainer@sha256:" + "0" * 64
ROLE = "arn:aws:iam::123456789012:role/Trainer"
SHAPE = botocore.session.get_session().get_service_model("sagemaker").operation_model("CreateTrainingJob").input_shape
SERVER = "arn:aws:sagemaker:us-west-2:123456789012:mlflow-tracking-server/runs"


def submit(options=None, **parts):
    given = {"image": "trainer:cuda", "role": ROLE, "output": "s3://bucket/output/", "instance_type": "ml.g6.2xlarge"}
    options = JobOptions(**{**given, **(options or {})})
    return Submission(options, "job-1", {"lora_r": "8"}, {"train": "s3://bucket/input/train/0/"}, **parts)


def build(options=None, **parts):
    request = build_request(submit(options, **parts), IMAGE, ROLE)
    assert ParamValidator().validate(request, SHAPE).generate_report() == ""
    return request


def test_a_plain_job():
    request = build(max_run_seconds=600)
    assert request["AlgorithmSpecification"]["TrainingImage"] == IMAGE
    names = {each["Name"] for each in request["AlgorithmSpecification"]["MetricDefinitions"]}
    assert {"train_loss", "eval_loss", "tokens_per_second"} <= names
    assert request["OutputDataConfig"] == {"S3OutputPath": "s3://bucket/output", "CompressionType": "NONE"}
    assert request["ResourceConfig"] == {"InstanceType": "ml.g6.2xlarge", "InstanceCount": 1, "VolumeSizeInGB": 100}
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 600}
    assert request["CheckpointConfig"] == {"S3Uri": "s3://bucket/checkpoints/job-1", "LocalPath": "/opt/ml/checkpoints"}
    assert request["Environment"] == {"LLM_TRAINER_IMAGE": IMAGE}
    assert not request.keys() & {"VpcConfig", "MlflowConfig", "EnableManagedSpotTraining", "EnableNetworkIsolation"}


def test_rewards_of_the_job_are_defined():
    encoded = encode_settings({"method": "rloo", "reward_functions": ["rewards.py:polite"]})
    names = {each["Name"] for each in define_job_metrics(encoded)}
    assert {"eval_reward", "rewards/polite/mean"} <= names
    assert not any("polite" in each["Name"] for each in define_job_metrics({"reward_functions": "polite"}))


def test_spot_has_time_to_wait():
    request = build({"spot": True}, max_run_seconds=600)
    assert request["EnableManagedSpotTraining"] is True
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 600, "MaxWaitTimeInSeconds": 1200}
    request = build({"spot": True, "max_wait_seconds": 900}, max_run_seconds=600)
    assert request["StoppingCondition"]["MaxWaitTimeInSeconds"] == 900


def test_preferences_keep_their_order_and_counts():
    preferences = {"ml.p5.48xlarge": 1, "ml.p4d.24xlarge": 2}
    resources = build({"instance_type": None, "instance_preferences": preferences})["ResourceConfig"]
    assert resources["InstancePreferences"] == [
        {"InstanceType": "ml.p5.48xlarge", "InstanceCount": 1},
        {"InstanceType": "ml.p4d.24xlarge", "InstanceCount": 2},
    ]
    assert not resources.keys() & {"InstanceType", "InstanceCount"}


def test_everything_else_that_a_job_may_have():
    request = build(
        {
            "keep_alive_seconds": 1800,
            "compress_output": True,
            "output_kms_key": "key-1",
            "volume_kms_key": "key-2",
            "subnets": ["subnet-1"],
            "security_groups": ["sg-1"],
            "network_isolation": True,
            "encrypt_traffic": True,
            "checkpoints": "s3://other/run/",
            "tags": {"team": "nlp"},
            "environment": {"NCCL_DEBUG": "INFO"},
        },
        mlflow={"mlflow_uri": SERVER, "mlflow_experiment_name": "tickets", "run_name": None},
    )
    assert request["ResourceConfig"]["KeepAlivePeriodInSeconds"] == 1800
    assert request["ResourceConfig"]["VolumeKmsKeyId"] == "key-2"
    assert request["OutputDataConfig"]["CompressionType"] == "GZIP"
    assert request["OutputDataConfig"]["KmsKeyId"] == "key-1"
    assert request["VpcConfig"] == {"SecurityGroupIds": ["sg-1"], "Subnets": ["subnet-1"]}
    assert request["EnableNetworkIsolation"] and request["EnableInterContainerTrafficEncryption"]
    assert request["CheckpointConfig"]["S3Uri"] == "s3://other/run"
    assert {"Key": "team", "Value": "nlp"} in request["Tags"]
    assert request["Environment"]["NCCL_DEBUG"] == "INFO"
    assert request["MlflowConfig"] == {"MlflowResourceArn": SERVER, "MlflowExperimentName": "tickets"}


def test_a_job_without_checkpoints_and_another_tracking_server():
    request = build(uses_checkpoints=False, mlflow={"mlflow_uri": "http://host:5000"})
    assert not request.keys() & {"CheckpointConfig", "MlflowConfig"}


def test_settings_are_written_as_the_job_decodes_them():
    given = {"model_id": "10", "lora_r": 8, "target_modules": ["q", "v"], "packing": True, "seed": None}
    assert encode_settings(given) == {
        "model_id": "10",
        "lora_r": "8",
        "target_modules": '["q", "v"]',
        "packing": "true",
        "seed": "null",
    }


@pytest.mark.parametrize("stem", ["qwen3-1.7b_lora", "-", "x" * 99])
def test_a_name_is_one_that_sagemaker_takes(stem):
    assert re.fullmatch(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}", choose_name(stem)) and len(choose_name(stem)) <= 63


def test_a_wait_that_is_shorter_than_the_run_is_told():
    (problem,) = find_request_problems(submit({"spot": True, "max_wait_seconds": 60}))
    assert "max_wait_seconds=60 is less than" in problem


def test_the_default_wait_stays_below_sagemakers_limit():
    days = 24 * 3600
    assert build({"spot": True}, max_run_seconds=20 * days)["StoppingCondition"]["MaxWaitTimeInSeconds"] == 28 * days
    assert list(find_request_problems(submit({"spot": True}, max_run_seconds=20 * days))) == []


@pytest.mark.parametrize("text", ["one\ntwo", "one\n", "\u2028"])
def test_a_text_of_several_lines_is_one_that_sagemaker_takes(text):
    (value,) = encode_settings({"system_prompt": text}).values()
    assert value.isprintable() and json.loads(value) == text
