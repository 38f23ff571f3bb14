# SPDX-License-Identifier: Apache-2.0
"""The templates of examples/infrastructure/, deployed to moto and read back.

moto makes a template's repository, roles, bucket and log group. What it leaves out is read from the template here, and
known to cfn-lint: the CodeBuild project, the bucket's policy, that it is private, what it forgets, that a push is
scanned. The repository's life cycle is given to moto by ECR's own call.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from botocore.exceptions import ClientError
from cfnlint.decode.cfn_yaml import load

from support.checkout import SOURCE
from support.codebuild import REGION

TEMPLATES = SOURCE / "examples/infrastructure"
ACCOUNT = "123456789012"  # moto's
NAME = "sagemaker-llm-trainer"
REPOSITORY_ARN = f"arn:aws:ecr:{REGION}:{ACCOUNT}:repository/{NAME}"
CONNECTION = f"arn:aws:codeconnections:{REGION}:{ACCOUNT}:connection/11111111-2222-3333-4444-555555555555"
SERVER = f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:mlflow-tracking-server/runs"
SECRET = f"arn:aws:secretsmanager:{REGION}:{ACCOUNT}:secret:hugging-face-AbCdEf"
PARAMETER = f"arn:aws:ssm:{REGION}:{ACCOUNT}:parameter/hugging-face"
# What AWS lets nobody limit to a resource.
WITHOUT_ARN = {
    *("ecr:GetAuthorizationToken", "cloudwatch:PutMetricData", "pricing:GetProducts"),
    *("sagemaker:ListEndpoints", "sagemaker:ListTrainingJobs"),
}


@pytest.fixture
def deploy(aws):
    """Deploys a template; its outputs."""

    def deploy_template(template, **parameters):
        cloudformation = aws.client("cloudformation")
        cloudformation.create_stack(
            StackName=template,
            TemplateBody=(TEMPLATES / f"{template}.yaml").read_text(encoding="utf-8"),
            Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()],
            Capabilities=["CAPABILITY_IAM"],
        )
        (stack,) = cloudformation.describe_stacks(StackName=template)["Stacks"]
        assert stack["StackStatus"] == "CREATE_COMPLETE"
        return {output["OutputKey"]: output["OutputValue"] for output in stack.get("Outputs", [])}

    return deploy_template


@pytest.fixture
def read_statements(aws):
    """All that a stack's role may do, and who may take it."""

    def read(stack):
        resources = aws.client("cloudformation").list_stack_resources(StackName=stack)["StackResourceSummaries"]
        (role,) = [entry["PhysicalResourceId"] for entry in resources if entry["ResourceType"] == "AWS::IAM::Role"]
        iam = aws.client("iam")
        names = iam.list_role_policies(RoleName=role)["PolicyNames"]
        documents = [iam.get_role_policy(RoleName=role, PolicyName=name)["PolicyDocument"] for name in names]
        trust = iam.get_role(RoleName=role)["Role"]["AssumeRolePolicyDocument"]
        # moto keeps a role's own policies as Python prints them.
        policies = [ast.literal_eval(str(document)) for document in documents]
        return [statement for policy in policies for statement in policy["Statement"]], trust["Statement"]

    return read


def read_properties(template, resource):
    return load(str(TEMPLATES / f"{template}.yaml"))["Resources"][resource]["Properties"]


def list_of(value):
    return value if isinstance(value, list) else [value]


def find_resources(statements, action):
    return [
        entry
        for statement in statements
        if action in list_of(statement["Action"])
        for entry in list_of(statement["Resource"])
    ]


def assert_least_privilege(statements):
    for statement in statements:
        actions, resources = list_of(statement["Action"]), list_of(statement["Resource"])
        assert statement["Effect"] == "Allow"
        assert not [action for action in actions if "*" in action]
        assert "*" not in resources or set(actions) <= WITHOUT_ARN
        assert all(re.fullmatch(r"\*|arn:aws:[a-z0-9-]+:[^*]*(\*$)?", entry) for entry in resources), resources


@pytest.mark.parametrize("template", sorted(TEMPLATES.glob("*.yaml")), ids=lambda path: path.stem)
def test_cfn_lint_finds_nothing(template):
    command = [Path(sys.executable).with_name("cfn-lint"), template]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.fixture
def repository(aws, deploy):
    outputs = deploy("registry")
    (repository,) = aws.client("ecr").describe_repositories(repositoryNames=[NAME])["repositories"]
    assert outputs["RepositoryUri"] == f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/{NAME}"
    return repository


def test_the_repository_scans_and_keeps_tags_but_those_that_move(repository):
    assert read_properties("registry", "Repository")["ImageScanningConfiguration"] == {"ScanOnPush": True}
    assert repository["imageTagMutability"] == "IMMUTABLE_WITH_EXCLUSION"
    filters = repository["imageTagMutabilityExclusionFilters"]
    assert {entry["filter"] for entry in filters} == {"cuda", "cpu", "cache-*"}


def test_the_repository_forgets_what_is_old(aws, repository):
    text = read_properties("registry", "Repository")["LifecyclePolicy"]["LifecyclePolicyText"]["Fn::Sub"]
    text = text.replace("${KeptBuilds}", "30")
    aws.client("ecr").put_lifecycle_policy(repositoryName=NAME, lifecyclePolicyText=text)
    rules = json.loads(text)["rules"]
    assert [rule["rulePriority"] for rule in rules] == [1, 2, 3, 4]
    assert rules[0]["selection"]["tagStatus"] == "untagged"
    patterns = {rule["selection"]["tagPatternList"][0]: rule["selection"]["countNumber"] for rule in rules[1:]}
    assert patterns == {"*.*.*-*": 1000, "*-cuda": 30, "*-cpu": 30}


@pytest.fixture
def build_outputs(deploy):
    location = "https://git.example/trainer.git"
    return deploy("codebuild", SourceLocation=location, ConnectionArn=CONNECTION)


def test_the_build_may_push_to_its_repository_and_keep_wheels(build_outputs, read_statements):
    statements, (trust,) = read_statements("codebuild")
    assert_least_privilege(statements)
    bucket = f"arn:aws:s3:::{build_outputs['Bucket']}"
    assert find_resources(statements, "ecr:PutImage") == [REPOSITORY_ARN]
    assert find_resources(statements, "s3:GetObject") == [f"{bucket}/wheels/*"]
    assert find_resources(statements, "s3:PutObject") == [f"{bucket}/wheels/*", f"{bucket}/builds/*"]
    assert find_resources(statements, "codeconnections:GetConnectionToken") == [CONNECTION]
    assert find_resources(statements, "ssm:PutParameter") == [
        f"arn:aws:ssm:{REGION}:{ACCOUNT}:parameter/{NAME}/wheels/*"
    ]
    (digests,) = [statement for statement in statements if "ssm:PutParameter" in list_of(statement["Action"])]
    assert digests["Condition"] == {"StringNotEquals": {"ssm:Overwrite": "true"}}  # a digest stays what it is
    assert trust["Principal"] == {"Service": "codebuild.amazonaws.com"}
    project = f"arn:aws:codebuild:{REGION}:{ACCOUNT}:project/{NAME}"
    assert trust["Condition"] == {"StringEquals": {"aws:SourceArn": project}}


def test_the_builds_bucket_is_encrypted_and_private_and_forgets_wheels(aws, build_outputs):
    s3, bucket = aws.client("s3"), build_outputs["Bucket"]
    (rule,) = s3.get_bucket_encryption(Bucket=bucket)["ServerSideEncryptionConfiguration"]["Rules"]
    assert rule["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] == "AES256"
    properties = read_properties("codebuild", "Bucket")
    assert set(properties["PublicAccessBlockConfiguration"].values()) == {True}
    rules = properties["LifecycleConfiguration"]["Rules"]
    assert {rule["Prefix"]: rule["ExpirationInDays"] for rule in rules if "Prefix" in rule} == {"wheels/": 365}


def test_the_build_log_is_kept_for_a_while(aws, build_outputs):
    (group,) = aws.client("logs").describe_log_groups(logGroupNamePrefix=f"/aws/codebuild/{NAME}")["logGroups"]
    assert group["retentionInDays"] == 90


def test_the_project_is_what_the_buildspec_asks_for():
    project = read_properties("codebuild", "Project")
    head = (SOURCE / "buildspec.yml").read_text(encoding="utf-8").partition("version:")[0]
    asked = set(re.findall(r"^#   ([A-Z_]+) ", head, re.MULTILINE))
    assert asked == {"REPOSITORY", "CACHE_FOLDER", "WHEEL_DIGESTS", "PIP_EXTRA_INDEX_URL"}
    environment = project["Environment"]
    assert {entry["Name"] for entry in environment["EnvironmentVariables"]} == asked | {"VARIANT"}
    assert (environment["ComputeType"], environment["PrivilegedMode"]) == ("BUILD_GENERAL1_LARGE", True)
    assert environment["ComputeType"] in head
    assert project["TimeoutInMinutes"] == 5 * 60 and "limit of five" in head
    assert project["Source"]["GitCloneDepth"] == 0


def test_a_training_job_reads_one_prefix_and_writes_another(deploy, read_statements):
    deploy("training-role", BucketName="data")
    statements, (trust,) = read_statements("training-role")
    assert_least_privilege(statements)
    below = {name: f"arn:aws:s3:::data/{name}/*" for name in ("input", "output", "checkpoints")}
    assert find_resources(statements, "s3:GetObject") == list(below.values())
    assert find_resources(statements, "s3:PutObject") == [below["output"], below["checkpoints"]]
    assert find_resources(statements, "ecr:BatchGetImage") == [REPOSITORY_ARN]
    assert not find_resources(statements, "ecr:PutImage")
    services = {action.partition(":")[0] for statement in statements for action in list_of(statement["Action"])}
    assert services == {"cloudwatch", "ecr", "logs", "s3"}
    assert trust["Principal"] == {"Service": "sagemaker.amazonaws.com"}
    jobs = [f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:{kind}/*" for kind in ("training-job", "hyper-parameter-tuning-job")]
    assert trust["Condition"] == {
        "StringEquals": {"aws:SourceAccount": ACCOUNT},
        "ArnLike": {"aws:SourceArn": jobs},
    }


@pytest.mark.parametrize("prefix", ["checkpoints", "checkpoints/job-7"])
def test_a_training_job_deletes_checkpoints_alone(deploy, read_statements, prefix):
    deploy("training-role", BucketName="data", CheckpointPrefix=prefix)
    statements, _ = read_statements("training-role")
    assert find_resources(statements, "s3:DeleteObject") == [f"arn:aws:s3:::data/{prefix}/*"]
    deleting = {action for statement in statements for action in list_of(statement["Action"]) if "Delete" in action}
    assert deleting == {"s3:DeleteObject"}


def test_a_training_job_tracks_and_reads_secrets_by_arn(deploy, read_statements):
    given = {"TrackingServerArn": SERVER, "SecretArns": SECRET, "ParameterArns": PARAMETER}
    deploy("training-role", BucketName="data", **given)
    statements, _ = read_statements("training-role")
    assert_least_privilege(statements)
    assert find_resources(statements, "sagemaker-mlflow:LogMetric") == [SERVER]
    assert find_resources(statements, "secretsmanager:GetSecretValue") == [SECRET]
    assert find_resources(statements, "ssm:GetParameter") == [PARAMETER]


def test_who_submits_uploads_below_one_prefix_and_hands_on_two_roles(deploy, read_statements):
    roles = [f"arn:aws:iam::{ACCOUNT}:role/{name}" for name in ("training", "serving")]
    given = {"PrincipalArn": f"arn:aws:iam::{ACCOUNT}:root", "TrainingRoleArn": roles[0], "ServingRoleArn": roles[1]}
    deploy("submitting-role", BucketName="data", KmsKeyArn=f"arn:aws:kms:{REGION}:{ACCOUNT}:key/1", **given)
    statements, (trust,) = read_statements("submitting-role")
    assert_least_privilege(statements)
    assert trust["Principal"] == {"AWS": given["PrincipalArn"]}
    assert find_resources(statements, "iam:PassRole") == roles
    (passing,) = [statement for statement in statements if statement["Action"] == "iam:PassRole"]
    assert passing["Condition"] == {"StringEquals": {"iam:PassedToService": "sagemaker.amazonaws.com"}}
    assert find_resources(statements, "s3:PutObject") == ["arn:aws:s3:::data/input/*"]
    assert find_resources(statements, "s3:GetObject") == ["arn:aws:s3:::data/output/*"]
    assert not find_resources(statements, "s3:DeleteObject")
    assert find_resources(statements, "kms:GenerateDataKey") == [f"arn:aws:kms:{REGION}:{ACCOUNT}:key/1"]


def test_an_endpoint_reads_results_and_bases_alone(deploy, read_statements):
    deploy("serving-role", BucketName="data")
    statements, (trust,) = read_statements("serving-role")
    assert_least_privilege(statements)
    assert trust["Principal"] == {"Service": "sagemaker.amazonaws.com"}
    assert find_resources(statements, "s3:GetObject") == ["arn:aws:s3:::data/input/*", "arn:aws:s3:::data/output/*"]
    assert not find_resources(statements, "s3:PutObject")


def test_a_template_without_its_bucket_is_refused(deploy):
    with pytest.raises(ClientError, match="BucketName"):
        deploy("training-role")
