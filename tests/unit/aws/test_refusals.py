# SPDX-License-Identifier: Apache-2.0
"""Every refusal of AWS is one sentence: what happened, and what to change."""

import pytest
from botocore import exceptions

from llm_trainer.aws import clients
from llm_trainer.aws.clients import open_client
from llm_trainer.aws.refusals import explain_refusal, explain_refusals
from llm_trainer.common.errors import UserError

WHO = "arn:aws:sts::123456789012:assumed-role/Analyst/me"
DENIAL = (
    f"User: {WHO} is not authorized to perform: sagemaker:DescribeTrainingJob on resource: "
    "arn:aws:sagemaker:us-west-2:123456789012:training-job/x because no identity-based policy allows it"
)
QUOTA = (
    "The account-level service limit 'ml.p4d.24xlarge for training job usage' is 0 Instances, with current utilization "
    "of 0 Instances and a request delta of 1 Instances. Please use AWS Service Quotas to request an increase."
)


def ask(aws, code, message, times=1):
    aws.refuse("DescribeTrainingJob", code, message, times)
    with explain_refusals():
        return open_client("sagemaker").describe_training_job(TrainingJobName="x")


@pytest.mark.parametrize(
    ("code", "message", "words"),
    [
        ("AccessDeniedException", DENIAL, (WHO, "sagemaker:DescribeTrainingJob", "training-job/x", "allow it")),
        ("AccessDeniedException", "Nope", ("arn:aws:sts::123456789012", "sagemaker:DescribeTrainingJob")),
        ("ExpiredTokenException", "The security token is expired", ("have expired", "aws sso login")),
        (
            "InvalidSignatureException",
            "Signature expired: 1 is now earlier than 2",
            ("machine's clock wrong", "set it"),
        ),
        ("RequestTimeTooSkewed", "The difference is too large", ("machine's clock wrong",)),
        ("UnrecognizedClientException", "Invalid token", ("does not know these credentials",)),
        ("ResourceLimitExceeded", QUOTA, ("'ml.p4d.24xlarge for training job usage'", "0 Instances", "Service Quotas")),
        ("ResourceLimitExceeded", "Too many", ("A quota of SageMaker is used up (Too many)",)),
        ("ResourceInUse", "Training job names must be unique", ("The name is taken",)),
        ("ResourceNotFound", "Requested resource not found.", ("found nothing", "region")),
        (
            "ValidationException",
            "1 validation\nerror",
            ("AWS refuses DescribeTrainingJob (ValidationException: 1 validation error).",),
        ),
    ],
)
def test_an_answer_that_is_an_error(aws, code, message, words):
    with pytest.raises(UserError) as caught:
        ask(aws, code, message)
    (problem,) = caught.value.problems
    assert all(word in problem for word in words), problem
    assert "\n" not in problem


def test_a_throttled_request_is_asked_again(aws):
    answer = {"TrainingJobName": "x", "TrainingJobStatus": "InProgress"}
    aws.answers["DescribeTrainingJob"] = lambda asked: answer
    assert ask(aws, "ThrottlingException", "Rate exceeded")["TrainingJobStatus"] == "InProgress"
    assert len(aws.list_arguments("DescribeTrainingJob")) == 2


def test_throttling_without_an_end(aws, monkeypatch):
    monkeypatch.setattr(clients, "ATTEMPTS", 1)
    with pytest.raises(UserError, match=r"AWS throttles DescribeTrainingJob .* try again"):
        ask(aws, "ThrottlingException", "Rate exceeded")


def test_nobody_answers(aws, monkeypatch):
    monkeypatch.setattr(clients, "ATTEMPTS", 1)
    aws.close()
    with pytest.raises(UserError, match=r"did not answer in time .*: check network"):
        ask(aws, "", "")


def test_no_credentials(aws, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match="No AWS credentials were found here"):
        ask(aws, "", "")


def test_no_region_and_no_profile(aws, monkeypatch):
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    with pytest.raises(UserError, match="No AWS region is set"):
        ask(aws, "", "")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(UserError, match=r"nobody.*: set AWS_PROFILE"):
        ask(aws, "", "")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (exceptions.UnauthorizedSSOTokenError(), "run `aws sso login`"),
        (exceptions.SSOTokenLoadError(profile_name="dev", error_msg="expired"), "run `aws sso login`"),
        (exceptions.TokenRetrievalError(provider="sso", error_msg="expired"), "run `aws sso login`"),
        (exceptions.CredentialRetrievalError(provider="process", error_msg="failed"), "could not be had"),
        (exceptions.ReadTimeoutError(endpoint_url="https://x"), "did not answer in time"),
        (exceptions.ConnectTimeoutError(endpoint_url="https://x"), "did not answer in time"),
        (exceptions.ProxyConnectionError(proxy_url="http://x"), "proxy and"),
        (exceptions.ParamValidationError(report="Unknown parameter\nin input"), "Unknown parameter in input"),
        (exceptions.UnknownServiceError(service_name="x", known_service_names=[]), "AWS could not be asked"),
    ],
)
def test_what_botocore_itself_finds(error, words):
    assert words in explain_refusal(error)
    assert "\n" not in explain_refusal(error)


def test_a_transfer_tells_what_aws_answered(aws, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"s3:PutObject found nothing \(.*bucket does not exist"), explain_refusals():
        open_client("s3").upload_file(str(tmp_path / "rows.jsonl"), "nobodys-bucket", "rows.jsonl")
