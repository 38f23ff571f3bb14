# SPDX-License-Identifier: Apache-2.0
"""Refusals of AWS, in one sentence each: what happened, and what to change."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llm_trainer.aws.permissions import find_action
from llm_trainer.common.errors import UserError, cut_quote, quote_error

DENIED = re.compile(r"AccessDenied|UnauthorizedOperation|AuthorizationError|NotAuthorized|^403$")
EXPIRED = re.compile(r"ExpiredToken|TokenRefreshRequired")
WRONG_CLOCK = re.compile(r"RequestTimeTooSkewed|RequestExpired|RequestInTheFuture|^InvalidSignature")
BROKEN = re.compile(r"^5\d\d$|Internal(Server)?(Error|Failure)|ServiceUnavailable")
UNKNOWN_KEYS = re.compile(r"InvalidClientTokenId|UnrecognizedClient|SignatureDoesNotMatch|InvalidAccessKeyId")
THROTTLED = re.compile(r"Throttl|TooManyRequests|RequestLimitExceeded|SlowDown")
NOT_THERE = re.compile(r"NoSuch|NotFound|^404$")
WHO = re.compile(r"User: (\S+) is not authorized to perform: (\S+?)(?: on resource: (\S+))?(?:[ ,]|$)")
QUOTA = re.compile(r"limit '([^']+)' is ([\d.]+ \w+)(?:.*?utilization of ([\d.]+ \w+))?")
LOG_IN = "run `aws sso login`, or renew the credentials"


@contextmanager
def explain_refusals() -> Iterator[None]:
    """Turn whatever AWS or boto3 refuses within the block into a UserError of one sentence."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise UserError(explain_refusal(error)) from error
    except Boto3Error as error:  # a transfer's, which was raised from what AWS answered
        cause = error.__cause__ or error.__context__
        known = isinstance(cause, BotoCoreError | ClientError)
        raise UserError(explain_refusal(cause) if known else f"AWS was not reached: {quote_error(error)}.") from error


def explain_refusal(error: BaseException | None) -> str:
    """Return the sentence for an error of botocore's."""
    from botocore.exceptions import ClientError

    return explain_answer(error) if isinstance(error, ClientError) else explain_local(error)


def explain_local(error: Any) -> str:
    """Return the sentence for what botocore itself finds: no credentials, no region, no connection, a wrong request."""
    from botocore import exceptions as kinds

    text = quote_error(error)
    if isinstance(error, kinds.NoCredentialsError | kinds.PartialCredentialsError):
        return "No AWS credentials were found here: run `aws configure` or `aws sso login`, or set AWS_PROFILE."
    if isinstance(error, kinds.NoRegionError):
        return "No AWS region is set: set AWS_DEFAULT_REGION, or `region` in the profile."
    if isinstance(error, kinds.ProfileNotFound):
        return f"{text}: set AWS_PROFILE to one of `aws configure list-profiles`."
    if isinstance(error, kinds.SSOError | kinds.TokenRetrievalError):
        return f"The SSO session of this profile has expired or was never begun ({text}): {LOG_IN}."
    if isinstance(error, kinds.CredentialRetrievalError):
        return f"The AWS credentials could not be had ({text}): {LOG_IN}."
    if isinstance(error, kinds.ParamValidationError):
        return f"The request is none that AWS takes ({cut_quote(' '.join(str(error).split()))}): change these options."
    if isinstance(error, kinds.ConnectionError | kinds.HTTPClientError):
        return f"AWS did not answer in time ({text}): check network, proxy and AWS_DEFAULT_REGION, and try again."
    return f"AWS could not be asked ({text})."


def explain_answer(error: Any) -> str:
    """Return the sentence for an answer of AWS's that is an error."""
    code = error.response["Error"].get("Code", "")
    message = cut_quote(" ".join(error.response["Error"].get("Message", "").split()).rstrip("."))
    if DENIED.search(code):
        return explain_denial(error.operation_name, message)
    if EXPIRED.search(code):
        return f"The AWS credentials have expired: {LOG_IN}."
    if UNKNOWN_KEYS.search(code):
        return f"AWS does not know these credentials ({code}): check AWS_PROFILE and the keys, or {LOG_IN}."
    if WRONG_CLOCK.search(code):
        return f"AWS finds this machine's clock wrong ({message or code}): set it, as by `timedatectl set-ntp true`."
    if code == "ResourceLimitExceeded":
        return explain_quota(message)
    if THROTTLED.search(code):
        return f"AWS throttles {error.operation_name} and went on so for all attempts ({code}): try again in a minute."
    if code == "ResourceInUse":
        return f"The name is taken ({message}): give another name."
    if NOT_THERE.search(code) or message.startswith(("Could not find", "Requested resource not found")):
        return f"{find_action(error.operation_name)} found nothing ({message or code}): check name, account and region."
    return f"AWS refuses {error.operation_name} ({code}: {message})."


def is_passing(error: BaseException) -> bool:
    """Tell whether a request that was refused so may succeed a little later, as it is."""
    from botocore import exceptions as kinds

    if isinstance(error, kinds.ClientError):
        code = error.response["Error"].get("Code", "")
        return bool(THROTTLED.search(code) or BROKEN.search(code))
    return isinstance(error, kinds.ConnectionError | kinds.HTTPClientError)


def explain_denial(operation: str, message: str) -> str:
    """Return the sentence for a missing permission: who lacks which action, and on what."""
    match = WHO.search(message)
    if match is None:
        who = find_identity()
        return f"{who} may not do {find_action(operation)} ({message or 'access denied'}): allow it that action."
    who, action, resource = match.groups()
    place = f" on {resource.rstrip(',')}" if resource else ""
    return f"{who} may not do {action}{place}: allow it that action (docs/submitting.md has the policy)."


def find_identity() -> str:
    """Return the ARN of whoever asks AWS here, for a message; a word in its place where AWS does not tell."""
    from botocore.exceptions import BotoCoreError, ClientError

    from llm_trainer.aws.clients import open_client

    try:
        return open_client("sts").get_caller_identity()["Arn"]
    except (BotoCoreError, ClientError):
        return "This identity"


def explain_quota(message: str) -> str:
    """Return the sentence for a quota that is used up: its name, its value, and where to raise it."""
    match = QUOTA.search(message)
    if match is None:
        return f"A quota of SageMaker is used up ({message}): ask for more at Service Quotas."
    name, value, used = match.groups()
    in_use = f", with {used} in use" if used else ""
    return (
        f"The quota {name!r} of this account and region is {value}{in_use}: ask for more at Service Quotas "
        "(Amazon SageMaker), or take another instance type or region."
    )
