# SPDX-License-Identifier: Apache-2.0
"""Each limit of CreateTrainingJob is told in one sentence, with the option that breaks it."""

from dataclasses import replace

import pytest

from llm_trainer.aws.options import JobOptions
from llm_trainer.aws.request_limits import find_breaches
from llm_trainer.aws.submission import Submission, build_request

IMAGE = "123456789012.dkr.ecr.us-west-2.amazonaws.com/trainer@sha256:" + "0" * 64
ROLE = "arn:aws:iam::123456789012:role/Trainer"
PLAIN = {"image": IMAGE, "role": ROLE, "output": "s3://bucket/output/", "instance_type": "ml.g6.2xlarge"}
JOB = Submission(JobOptions(**PLAIN), "job-1", {"lora_r": "8"}, {"train": "s3://bucket/input/train/0/"})


def find(**parts):
    return list(find_breaches(build_request(replace(JOB, **parts), IMAGE, ROLE)))


def find_in_options(**options):
    return find(options=JobOptions(**{**PLAIN, **options}))


def test_a_good_request_has_none():
    assert find() == []
    assert (
        find_in_options(tags={"Größe": "a b_c.:/=+-@"}, environment={"A": "one\ntwo"}, output_kms_key="alias/x") == []
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"environment": {"A-B": ""}}, "environment 'A-B'='A-B' is not written as SageMaker asks ([a-zA-Z_]"),
        ({"environment": {"A": "x" * 513}}, "environment 'A' has 513 characters, and SageMaker takes 0 to 512"),
        (
            {"environment": {f"A{i}": "" for i in range(100)}},
            "environment has 101 entries, and SageMaker takes 0 to 100",
        ),
        ({"tags": {f"a{i}": "" for i in range(50)}}, "tags has 51 entries, and SageMaker takes 0 to 50"),
        ({"tags": {"team": "a*b"}}, "tags='a*b' is not written as SageMaker asks"),
        ({"tags": {"team": "a\nb"}}, "is not written as SageMaker asks"),
        ({"tags": {"": "a"}}, "tags has 0 characters, and SageMaker takes 1 to 128: write more."),
        ({"tags": {"AWS:team": "a"}}, "tags has 'AWS:team', and AWS keeps names that begin with aws:"),
        ({"output_kms_key": "a b"}, "output_kms_key='a b' is not written"),
        ({"volume_kms_key": "key"}, "volume_kms_key on ml.g6.2xlarge, whose own NVMe disks"),
        ({"subnets": ["subnet 1"], "security_groups": ["sg-1"]}, "subnets='subnet 1' is not written"),
        ({"subnets": [f"s-{i}" for i in range(17)], "security_groups": ["sg-1"]}, "subnets has 17 entries"),
        ({"subnets": ["s-1"], "security_groups": [f"s-{i}" for i in range(6)]}, "security_groups has 6 entries"),
        ({"checkpoints": "s3://bucket/" + "x" * 1024}, "checkpoints has 1036 characters"),
        (
            {"instance_type": "ml.g6.2xlrge"},
            "instance_type='ml.g6.2xlrge' is none that SageMaker trains on: the nearest",
        ),
        ({"instance_type": "g6.2xlarge"}, "the nearest is 'ml.g6.2xlarge'"),
        (
            {"instance_type": None, "instance_preferences": {"ml.g6.2xlarge": 0}},
            "instance_preferences has ml.g6.2xlarge=0",
        ),
    ],
)
def test_an_option_beyond_a_limit(options, words):
    (problem,) = find_in_options(**options)
    assert words in problem


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"name": "a--"}, "name='a--' is not written"),
        ({"hyperparameters": {f"a{i}": "" for i in range(101)}}, "hyperparameters has 101 entries"),
        ({"hyperparameters": {"chat_template": "x" * 2501}}, "chat_template has 2501 characters, and SageMaker takes"),
        ({"hyperparameters": {"chat_template": "x\ny"}}, "write it to a YAML file in a channel `config`"),
        ({"channels": {f"a{i}": "s3://bucket/x" for i in range(21)}}, "channels has 21 entries, and SageMaker takes"),
        ({"max_run_seconds": 2419201}, "max_run_seconds=2419201 is more than the 28 days"),
        ({"mlflow": {"mlflow_uri": "arn:aws:sagemaker:us-west-2:123456789012:mlflow-tracking-server/runs",
                     "run_name": "x" * 257}}, "run_name has 257 characters"),
    ],
)  # fmt: skip
def test_a_job_beyond_a_limit(parts, words):
    (problem,) = find(**parts)
    assert words in problem


def test_a_family_that_is_new_is_left_to_aws():
    assert find_in_options(instance_type="ml.p99.48xlarge", volume_kms_key="key") == []
