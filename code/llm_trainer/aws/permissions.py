# SPDX-License-Identifier: Apache-2.0
"""The IAM action behind each request to AWS, and why it is made: for messages, documents and policies."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Permission:
    """An IAM action, the commands that need it, and why."""

    action: str
    commands: str
    reason: str


READS = Permission("s3:GetObject", "fetch, deploy", "reads the results")
UPLOADS = Permission("s3:PutObject", "submit", "uploads channels")
# By boto3's operation, as an error names it.
PERMISSIONS = {
    "CreateTrainingJob": Permission("sagemaker:CreateTrainingJob", "submit", "starts the job"),
    "DescribeTrainingJob": Permission(
        "sagemaker:DescribeTrainingJob", "watch, fetch, deploy", "tells the state of a job, and where its result is"
    ),
    "StopTrainingJob": Permission("sagemaker:StopTrainingJob", "stop", "ends the job in good order"),
    "ListTrainingJobs": Permission("sagemaker:ListTrainingJobs", "list", "lists the newest jobs"),
    "ListEndpoints": Permission("sagemaker:ListEndpoints", "list", "lists what costs money until it is deleted"),
    "CreateModel": Permission("sagemaker:CreateModel", "deploy", "names the result and the image that serves it"),
    "DescribeModel": Permission("sagemaker:DescribeModel", "invoke", "tells whether an adapter is served"),
    "DeleteModel": Permission("sagemaker:DeleteModel", "deploy, delete", "removes the name; the result stays"),
    "CreateEndpointConfig": Permission("sagemaker:CreateEndpointConfig", "deploy", "names the endpoint's instances"),
    "DeleteEndpointConfig": Permission("sagemaker:DeleteEndpointConfig", "deploy, delete", "removes that again"),
    "CreateEndpoint": Permission("sagemaker:CreateEndpoint", "deploy", "starts the endpoint"),
    "DescribeEndpoint": Permission("sagemaker:DescribeEndpoint", "deploy", "tells when the endpoint answers"),
    "DeleteEndpoint": Permission("sagemaker:DeleteEndpoint", "delete", "ends the endpoint"),
    "InvokeEndpoint": Permission("sagemaker:InvokeEndpoint", "invoke", "asks the model"),
    "DescribeImages": Permission("ecr:DescribeImages", "submit", "finds the digest behind the image's tag"),
    "ListObjectsV2": Permission("s3:ListBucket", "submit, fetch, deploy", "finds earlier uploads, and the results"),
    "HeadObject": READS,
    "GetObject": READS,
    "PutObject": UPLOADS,
    "CreateMultipartUpload": UPLOADS,
    "UploadPart": UPLOADS,
    "CompleteMultipartUpload": UPLOADS,
    "AbortMultipartUpload": Permission("s3:AbortMultipartUpload", "submit", "clears away what was broken off"),
    "DescribeLogStreams": Permission("logs:DescribeLogStreams", "watch", "finds the log of each instance"),
    "GetLogEvents": Permission("logs:GetLogEvents", "watch", "reads the log"),
    "GetProducts": Permission("pricing:GetProducts", "plan --prices", "asks what instances cost"),
}
# Actions that AWS asks for beside those of the requests.
IMPLIED = (
    Permission("iam:PassRole", "submit, deploy", "hands the role of the job or of the endpoint to SageMaker"),
    Permission("sagemaker:AddTags", "submit", "tags the job"),
)
FREE = ("GetCallerIdentity",)  # allowed to everybody: tells the account, for a role that is given by its name


def find_action(operation: str) -> str:
    """Return the IAM action of a request, or the operation itself where it is none of ours."""
    permission = PERMISSIONS.get(operation)
    return permission.action if permission else operation
