# SPDX-License-Identifier: Apache-2.0
"""The commands about endpoints: from a job to an answer, and away again."""

import pytest

from llm_trainer.aws import deployment
from llm_trainer.cli.main import run_command
from support.aws_server import FINISHED_JOB, RESULT
from support.tiny_processors import draw


@pytest.fixture
def job(aws, monkeypatch):
    monkeypatch.setattr(deployment, "PAUSE_SECONDS", 0)
    aws.furnish()
    aws.answers["DescribeTrainingJob"] = lambda asked: FINISHED_JOB
    aws.put_files(RESULT, {"serving.env": "OPTION_MODEL_ID=/opt/ml/model\n"})
    return aws


def test_a_job_is_served_asked_and_deleted(job, capsys, tmp_path):
    assert run_command(["deploy", "job-1", "--instance_type", "ml.m4.xlarge"]) == 0
    (model,) = job.list_arguments("CreateModel")
    assert model["ExecutionRoleArn"] == FINISHED_JOB["RoleArn"]
    assert model["PrimaryContainer"]["Image"].startswith("763104351884.dkr.ecr.us-west-2.amazonaws.com/djl-inference:")
    (variant,) = job.list_arguments("CreateEndpointConfig")[0]["ProductionVariants"]
    assert variant["InferenceAmiVersion"] == "al2023-ami-sagemaker-inference-gpu-4-1"
    told = capsys.readouterr().out
    assert "It costs money until `llm-trainer delete job-1`." in told
    assert 'llm-trainer invoke job-1 "QUESTION"' in told
    answer = {"choices": [{"message": {"content": "Because they can."}}]}
    job.answers["InvokeEndpoint"] = lambda asked: answer
    assert run_command(["invoke", "job-1", "Why do cats purr?"]) == 0
    assert capsys.readouterr().out == "Because they can.\n"
    draw(4, 3).save(tmp_path / "cat.webp")
    assert run_command(["invoke", "job-1", "What is it?", "--image", str(tmp_path / "cat.webp")]) == 0
    (image, _) = job.list_arguments("InvokeEndpoint")[-1]["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/webp;base64,")
    assert capsys.readouterr().out == "Because they can.\n"
    assert run_command(["invoke", "job-1", "What is it?", "--image", str(tmp_path)]) == 1
    assert "is no JPEG, PNG, WebP, GIF, BMP or TIFF file that can be read: give one." in capsys.readouterr().err
    answer["choices"] = []
    assert run_command(["invoke", "job-1", "Why?"]) == 1
    assert "--json shows them" in capsys.readouterr().err
    assert run_command(["invoke", "job-1", "Why?", "--json"]) == 0
    assert capsys.readouterr().out == '{"choices": []}\n'
    assert run_command(["delete", "job-1"]) == 0
    assert "Deleted endpoint, endpoint config, model job-1." in capsys.readouterr().out
    assert run_command(["delete", "job-1"]) == 1
    assert "There is no endpoint 'job-1' here" in capsys.readouterr().err


def test_another_name_role_and_image(job):
    digest = job.client("ecr").describe_images(repositoryName="sagemaker-llm-trainer")["imageDetails"][0]["imageDigest"]
    words = ["--name", "served", "--role", "Serving", "--image", "sagemaker-llm-trainer:cuda", "--instance_count", "2"]
    assert run_command(["deploy", "job-1", "--instance_type", "ml.m4.xlarge", *words]) == 0
    (model,) = job.list_arguments("CreateModel")
    assert (model["ModelName"], model["ExecutionRoleArn"]) == ("served", "arn:aws:iam::123456789012:role/Serving")
    assert model["PrimaryContainer"]["Image"].endswith(digest)
    (variant,) = job.list_arguments("CreateEndpointConfig")[0]["ProductionVariants"]
    assert variant["InitialInstanceCount"] == 2 and "InferenceAmiVersion" not in variant
