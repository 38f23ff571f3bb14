# SPDX-License-Identifier: Apache-2.0
"""An endpoint serves what the job has left, as the job's serving.env says, and leaves nothing where it is refused."""

import io
import json
import tarfile

import pytest

from llm_trainer.aws import deployment
from llm_trainer.aws.deployment import (
    Deployment,
    ask_endpoint,
    await_endpoint,
    build_container,
    create_endpoint,
    delete_endpoint,
    find_artefacts,
    find_base,
    read_serving_settings,
)
from llm_trainer.aws.refusals import explain_refusals
from llm_trainer.common.errors import UserError

PLACE = "s3://bucket/output/job-1/output/model/"
SERVING_ENV = "# For LMI.\nOPTION_ENGINE=Python\nOPTION_MODEL_ID=/opt/ml/model\nOPTION_OVERRIDES=a=b\n"
SETTINGS = {"OPTION_ENGINE": "Python", "OPTION_MODEL_ID": "/opt/ml/model", "OPTION_OVERRIDES": "a=b"}
ROLE = "arn:aws:iam::123456789012:role/Serving"
WANTED = Deployment("served", "ml.m4.xlarge", 1, "image", ROLE)


def describe(status="Completed", place=PLACE):
    return {
        "TrainingJobName": "job-1",
        "TrainingJobStatus": status,
        "ModelArtifacts": {"S3ModelArtifacts": place} if place else {},
    }


def pack(name, content):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for member_name, text in (("config.json", b"{}"), (name, content)):
            member = tarfile.TarInfo(member_name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    return buffer.getvalue()


def test_settings_of_a_prefix_and_of_an_archive(aws):
    aws.furnish()
    assert find_artefacts(describe(place=PLACE.rstrip("/"))) == PLACE
    aws.put_files(PLACE, {"serving.env": SERVING_ENV})
    assert read_serving_settings(PLACE) == SETTINGS
    aws.put_files("s3://bucket/output", {"model.tar.gz": pack("./serving.env", SERVING_ENV.encode())})
    assert read_serving_settings(find_artefacts(describe(place="s3://bucket/output/model.tar.gz"))) == SETTINGS


def test_a_result_that_cannot_be_served(aws):
    aws.furnish()
    with pytest.raises(UserError, match=r"has no serving\.env: LMI cannot serve this result"):
        read_serving_settings(PLACE)
    with pytest.raises(UserError, match="job-1 is Failed: only what a job has left is served"):
        find_artefacts(describe("Failed"))
    with pytest.raises(UserError, match="only what a job has left"):
        find_artefacts(describe(place=None))


def test_the_container_of_a_prefix_an_archive_and_an_adapter():
    container = build_container(WANTED, PLACE, SETTINGS)
    assert container["Environment"] == SETTINGS
    source = container["ModelDataSource"]["S3DataSource"]
    assert source == {"S3Uri": PLACE, "S3DataType": "S3Prefix", "CompressionType": "None"}
    source = build_container(WANTED, "s3://b/model.tar.gz", SETTINGS)["ModelDataSource"]["S3DataSource"]
    assert source == {"S3Uri": "s3://b/model.tar.gz", "S3DataType": "S3Object", "CompressionType": "Gzip"}
    wanted = Deployment("served", "ml.m4.xlarge", 1, "image", ROLE, "s3://bucket/base/")
    on_hub = {"OPTION_MODEL_ID": "org/base", "OPTION_REVISION": "abc"}
    for settings in ({}, on_hub):
        assert build_container(wanted, PLACE, settings)["Environment"] == {"OPTION_MODEL_ID": "s3://bucket/base/"}


def test_the_base_of_an_adapter_is_the_one_of_the_jobs_channel(aws, monkeypatch):
    aws.furnish()
    source = {"S3DataSource": {"S3Uri": "s3://bucket/input/model/0a"}}
    job = {**describe(), "InputDataConfig": [{"ChannelName": "model", "DataSource": source}]}
    for without in (job, describe()):
        with pytest.raises(UserError, match=r"without a config\.json in S3.*--model_id s3://BUCKET/PREFIX/"):
            find_base(without, {})
    aws.put_files("s3://bucket/input/model/0a", {"config.json": "{}"})
    assert find_base(job, {}) == "s3://bucket/input/model/0a/"
    assert find_base(job, SETTINGS) is None
    monkeypatch.setattr("llm_trainer.common.hub.needs_token", lambda model: model == "org/gated")
    assert find_base(job, {"OPTION_MODEL_ID": "org/open"}) is None
    with pytest.raises(UserError, match=r"org/gated is gated or private, .*--model_id.*merge_weights=true"):
        find_base(job, {"OPTION_MODEL_ID": "org/gated"})


def test_an_endpoint_from_its_beginning_to_its_end(aws, monkeypatch, capsys):
    create_endpoint(WANTED, PLACE, SETTINGS)
    (model,), (config,) = aws.list_arguments("CreateModel"), aws.list_arguments("CreateEndpointConfig")
    (variant,) = config["ProductionVariants"]
    assert (model["ModelName"], model["ExecutionRoleArn"]) == ("served", ROLE)
    assert (variant["ModelName"], variant["InstanceType"]) == ("served", "ml.m4.xlarge")
    assert aws.list_arguments("CreateEndpoint") == [{"EndpointName": "served", "EndpointConfigName": "served"}]
    monkeypatch.setattr(deployment, "PAUSE_SECONDS", 0)
    states = ["Creating", "Creating", "InService"]
    aws.answers["DescribeEndpoint"] = lambda asked: {"EndpointName": "served", "EndpointStatus": states.pop(0)}
    await_endpoint("served")
    assert capsys.readouterr().out.splitlines() == ["Endpoint served: Creating", "Endpoint served: InService"]
    assert delete_endpoint("served") == ["endpoint", "endpoint config", "model"]
    assert delete_endpoint("served") == []


def test_an_endpoint_that_fails_says_why(aws):
    failed = {"EndpointName": "served", "EndpointStatus": "Failed", "FailureReason": "no health check passed."}
    aws.answers["DescribeEndpoint"] = lambda asked: failed
    with pytest.raises(UserError, match=r"is Failed \(no health check passed\): see its log, and delete it"):
        await_endpoint("served")


def test_what_is_refused_leaves_nothing(aws):
    quota = "The account-level service limit 'ml.m4.xlarge for endpoint usage' is 0 Instances, with current"
    aws.refuse("CreateEndpoint", "ResourceLimitExceeded", quota)
    with pytest.raises(UserError, match=r"'ml\.m4\.xlarge for endpoint usage'"), explain_refusals():
        create_endpoint(WANTED, PLACE, SETTINGS)
    assert aws.list_arguments("DeleteModel") == [{"ModelName": "served"}]
    assert aws.list_arguments("DeleteEndpointConfig") == [{"EndpointConfigName": "served"}]
    assert delete_endpoint("served") == []


@pytest.mark.parametrize(
    ("settings", "adapter"), [(SETTINGS, {}), ({"OPTION_ENABLE_LORA": "true"}, {"adapters": "trained"})]
)
def test_an_adapter_is_asked_by_its_name(aws, settings, adapter):
    wanted = Deployment("served", "ml.m4.xlarge", 1, "image", ROLE, "s3://bucket/base/")
    create_endpoint(wanted, PLACE, settings)
    answer = {"choices": [{"message": {"content": "Because they can."}}]}
    aws.answers["InvokeEndpoint"] = lambda asked: answer
    assert ask_endpoint("served", "Why?", 64) == answer
    (asked,) = aws.list_arguments("InvokeEndpoint")
    assert asked == {"messages": [{"role": "user", "content": "Why?"}], "max_tokens": 64, **adapter}
    assert json.dumps(asked)


def test_images_come_before_the_question_and_no_more_than_the_server_takes(aws):
    settings = {"OPTION_MODEL_ID": "/opt/ml/model", "OPTION_LIMIT_MM_PER_PROMPT": '{"image":1}'}
    create_endpoint(Deployment("served", "ml.m4.xlarge", 1, "image", ROLE), PLACE, settings)
    aws.answers["InvokeEndpoint"] = lambda asked: {}
    ask_endpoint("served", "Why?", 64, ["data:image/png;base64,AA=="])
    (asked,) = aws.list_arguments("InvokeEndpoint")
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    assert asked["messages"] == [{"role": "user", "content": [image, {"type": "text", "text": "Why?"}]}]
    with pytest.raises(UserError, match=r"^2 images and endpoint served takes 1 a request .*: leave some out, or "):
        ask_endpoint("served", "Why?", 64, ["a", "b"])
    assert len(aws.list_arguments("InvokeEndpoint")) == 1
