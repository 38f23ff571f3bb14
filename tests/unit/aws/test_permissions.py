# SPDX-License-Identifier: Apache-2.0
"""The policy allows each request that our code makes, and none else; documents list each with its reason."""

import re

import botocore.client
import botocore.session
import pytest
import yaml

from llm_trainer.aws import deployment, watching
from llm_trainer.aws.permissions import FREE, IMPLIED, PERMISSIONS, find_action
from llm_trainer.cli.main import run_command
from support.aws_server import rehearse_well, write_rows
from support.measures import CODE, ROOT

SERVICES = {"sagemaker": ("sagemaker", "sagemaker-runtime")}
LARGE = {"CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload", "AbortMultipartUpload"}  # of a large file
TEMPLATE = ROOT / "examples/infrastructure/submitting-role.yaml"
OPTIONS = ["--image", "sagemaker-llm-trainer:cuda", "--role", "Trainer", "--output", "s3://bucket/output"]
PLACE = "s3://bucket/output/job-1/output"


class TemplateLoader(yaml.SafeLoader):
    """Reads CloudFormation's own tags as nothing."""


TemplateLoader.add_multi_constructor("!", lambda loader, suffix, node: None)


def find_services(operation):
    service = PERMISSIONS[operation].action.partition(":")[0]
    return SERVICES.get(service, (service,))


@pytest.mark.parametrize("operation", PERMISSIONS)
def test_the_operation_is_one_of_the_service(operation):
    session = botocore.session.get_session()
    names = [session.get_service_model(service).operation_names for service in find_services(operation)]
    assert any(operation in each for each in names)


def test_an_operation_of_nobody_stands_for_itself():
    assert find_action("HeadObject") == "s3:GetObject"
    assert find_action("ListBuckets") == "ListBuckets"


def test_the_policy_allows_these_actions_and_none_else():
    template = yaml.load(TEMPLATE.read_text(encoding="utf-8"), TemplateLoader)
    policies = template["Resources"]["Role"]["Properties"]["Policies"]
    statements = [statement for policy in policies for statement in policy["PolicyDocument"]["Statement"]]
    actions = [statement["Action"] for statement in statements]
    allowed = [action for each in actions for action in (each if isinstance(each, list) else [each])]
    assert len(allowed) == len(set(allowed))
    assert set(allowed) == {permission.action for permission in (*PERMISSIONS.values(), *IMPLIED)}


def test_the_document_has_each_action_with_its_reason():
    text = (ROOT / "docs/submitting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z0-9]+:\w+)` \| (.+) \| (.+) \|$", text, re.MULTILINE)
    assert {action for action, _, _ in rows} == {each.action for each in (*PERMISSIONS.values(), *IMPLIED)}
    assert all(commands and reason for _, commands, reason in rows)


def test_all_commands_together_make_these_requests_and_none_else(aws, tmp_path, monkeypatch):
    made, call = set(), botocore.client.BaseClient._make_api_call

    def note(client, operation, arguments):
        made.add(operation)
        return call(client, operation, arguments)

    aws.furnish()
    monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", note)
    monkeypatch.setattr(watching, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(deployment, "PAUSE_SECONDS", 0)
    monkeypatch.setattr("llm_trainer.cli.sagemaker.submit.check_tree", rehearse_well)
    monkeypatch.setenv("LLM_TRAINER_DATA_DIR", "")
    channels = f'{{"train": "{write_rows(tmp_path / "train")}", "model": "{write_rows(tmp_path / "model")}"}}'
    words = [*OPTIONS, "--name", "job-1", "--instance_type", "ml.g6.2xlarge", "--channels", channels]
    assert run_command(["submit", *words]) == 0
    aws.find_job("job-1").model_artifacts = {"S3ModelArtifacts": f"{PLACE}/model"}
    aws.put_files(PLACE, {"model/serving.env": "OPTION_MODEL_ID=/opt/ml/model\n"})
    aws.client("logs").create_log_group(logGroupName=watching.LOG_GROUP)
    aws.client("logs").create_log_stream(logGroupName=watching.LOG_GROUP, logStreamName="job-1/algo-1-1")
    made -= {"PutObject", "CreateLogGroup", "CreateLogStream"}  # the test's own
    aws.answers["StopTrainingJob"] = lambda asked: {}
    aws.answers["InvokeEndpoint"] = lambda asked: {"choices": [{"message": {"content": "Hi"}}]}
    for command in (
        ["watch", "job-1"],
        ["fetch", "job-1", "--output", str(tmp_path / "results")],
        ["stop", "job-1"],
        ["deploy", "job-1", "--instance_type", "ml.m4.xlarge"],
        ["invoke", "job-1", "Hi"],
        ["list"],
        ["delete", "job-1"],
    ):
        assert run_command(command) == 0, command
    assert made | {"PutObject"} == PERMISSIONS.keys() - LARGE - {"GetProducts"} | set(FREE)


def test_no_other_module_asks_aws_unseen():
    asking = {str(file.relative_to(CODE)) for file in CODE.rglob("*.py") if "import boto3" in file.read_text()}
    assert asking == {"aws/clients.py", "aws/price_list.py", "config/secret_references.py"}
