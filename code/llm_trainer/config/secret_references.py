# SPDX-License-Identifier: Apache-2.0
"""Secrets that a job is given by reference: the ARN of a secret or a parameter stands in the place of its value.

The launcher reads each once a host. From there a value is passed on in environment variables alone, and only to the
processes that use it.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

from pydantic import SecretStr

from llm_trainer.common.bounded_parsing import UnreadableTextError, read_json
from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.common.redaction import note_secrets

HUB_TOKEN = "LLM_TRAINER_HUB_TOKEN"  # only the push uses it: this token must write, where HF_TOKEN need only read
# The setting of the same secret, by variable. The setting wins.
VARIABLES = {
    "HF_TOKEN": "token",
    "HUGGING_FACE_HUB_TOKEN": None,  # its older name, which the Hub's library still reads
    "WANDB_API_KEY": "wandb_token",
    HUB_TOKEN: "hub_token",
    "MLFLOW_TRACKING_PASSWORD": None,
    "MLFLOW_TRACKING_TOKEN": None,
}
Use = Literal["hub", "push", "wandb", "mlflow"]
# The variables that hold secrets, by what they are used for. What a user names otherwise is left to the user.
USED_FOR: dict[Use, tuple[str, ...]] = {
    "hub": ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
    "push": (HUB_TOKEN,),
    "wandb": ("WANDB_API_KEY",),
    # Behind MLflow may stand SageMaker, or artefacts in S3.
    "mlflow": (
        *("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "DATABRICKS_TOKEN"),
        *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_CONTAINER_AUTHORIZATION_TOKEN"),
    ),
}
WITHHELD = "withheld"  # in the place of W&B's key: workers check the settings again, and look whether there is one
REFERENCE = re.compile(r"arn:aws[\w-]*:(?:(secretsmanager):([\w-]+):\d+:secret:.+|(ssm):([\w-]+):\d+:parameter/.+)")
ACTIONS = {"secretsmanager": "secretsmanager:GetSecretValue", "ssm": "ssm:GetParameter"}
NOT_THERE = ("ResourceNotFoundException", "ParameterNotFound", "ParameterVersionNotFound")
CONNECT_SECONDS, READ_SECONDS, ATTEMPTS = 5, 10, 3


def withhold_secrets(variables: Mapping[str, str], uses: Collection[Use]) -> dict[str, str]:
    """Return the variables without the secrets that a process has no use for."""
    withheld = {name for use, names in USED_FOR.items() if use not in uses for name in names} & variables.keys()
    kept = {name: value for name, value in variables.items() if name not in withheld}
    return kept | {name: WITHHELD for name in withheld if name in USED_FOR["wandb"]}


def is_reference(value: str) -> bool:
    """Tell whether a value is the ARN of a secret. No token begins like one."""
    return value.startswith("arn:")


def read_secret_variables(secrets: Mapping[str, SecretStr | None], variables: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables in which libraries look for secrets. References are replaced by what they name.

    `secrets` are those that were given as settings, by name. A user's own script has none: the values then come from
    the variables alone.
    Raises UserError with a sentence for every reference that cannot be read.
    """
    values: dict[str, str] = {}
    problems: list[str] = []
    for variable, setting in VARIABLES.items():
        secret = secrets.get(setting) if setting else None
        # Without the line break that a file or a shell leaves at its end: no header can hold one.
        value: str = (secret.get_secret_value() if secret else variables.get(variable, "")).strip()
        if not value:
            continue
        name = setting if secret and setting else variable
        try:
            values[variable] = read_secret(value, name, variable) if is_reference(value) else value
        except UserError as error:
            problems += error.problems
    note_secrets(values)
    if problems:
        raise UserError(*problems)
    return values


def read_secret(arn: str, name: str, variable: str) -> str:
    """Return the value that the ARN stands for. Raises UserError where it cannot be read.

    `name` is the setting or variable that holds the ARN; `variable` is the one that gets the value.
    """
    match = REFERENCE.fullmatch(arn)
    if match is None:
        raise UserError(
            f"{name}={arn!r} is the ARN of neither a Secrets Manager secret (arn:aws:secretsmanager:REGION:ACCOUNT:"
            "secret:NAME) nor an SSM parameter (arn:aws:ssm:REGION:ACCOUNT:parameter/NAME): give one of these."
        )
    service, region = filter(None, match.groups())
    return choose_value(fetch_secret(arn, service, region, name), arn, name, variable)


def fetch_secret(arn: str, service: str, region: str, name: str) -> str:
    """Return the decrypted text of a secret or parameter. Raises UserError where AWS does not give it."""
    import boto3  # it takes a quarter of a second, and most jobs have no references
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    retries = {"total_max_attempts": ATTEMPTS, "mode": "standard"}
    config = Config(connect_timeout=CONNECT_SECONDS, read_timeout=READ_SECONDS, retries=retries)
    try:
        client = boto3.Session().client(service, region_name=region, config=config)
        if service == "ssm":
            return client.get_parameter(Name=arn, WithDecryption=True)["Parameter"]["Value"]
        answer = client.get_secret_value(SecretId=arn)
    except (BotoCoreError, ClientError) as error:
        raise UserError(f"{name} refers to {arn}, {explain_refusal(error, service, region)}.") from error
    if "SecretString" not in answer:
        raise UserError(f"{name} refers to {arn}, which holds bytes and no text: store the value as SecretString.")
    return answer["SecretString"]


def explain_refusal(error: Exception, service: str, region: str) -> str:
    """Return why AWS did not give the value, and what to change: the end of a sentence, without its full stop."""
    from botocore.exceptions import ClientError, NoCredentialsError, PartialCredentialsError

    action = ACTIONS[service]
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return f"and there are no AWS credentials here: run under a role that is allowed {action}"
    if not isinstance(error, ClientError):
        return (
            f"and {service} in {region} cannot be reached ({quote_error(error)}): give the job's subnets a VPC "
            f"endpoint for {service}, or a NAT gateway, and no network isolation"
        )
    code = error.response["Error"]["Code"]
    if code in NOT_THERE:
        return "which does not exist: check name, account and region"
    if code.startswith("AccessDenied"):
        return f"which may not be read: allow the job's role {action}, and kms:Decrypt where your own key encrypts it"
    return f"which could not be read ({code}: {quote_error(error)}): the job's role needs {action}"


def choose_value(text: str, arn: str, name: str, variable: str) -> str:
    """Return the text of a secret. In a JSON object it is the value with the variable's name, or the only value.

    Raises UserError where an object has neither, or cannot be read.
    """
    try:
        fields: Any = read_json(text)
    except UnreadableTextError as error:
        if text.lstrip().startswith("{"):  # no token begins like an object
            raise UserError(f"{name} refers to {arn}, a JSON object that {error.reason}: write it again.") from error
        fields = None
    if not isinstance(fields, dict):
        return text.strip()
    value = fields.get(variable, next(iter(fields.values())) if len(fields) == 1 else None)
    if not isinstance(value, str) or not value:
        raise UserError(
            f"{name} refers to {arn}, a JSON object with the keys {', '.join(fields)}: name the one with the text "
            f"{variable}."
        )
    return value
