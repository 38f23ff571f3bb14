# SPDX-License-Identifier: Apache-2.0
"""A small HTTP server that plays Secrets Manager and the Parameter Store, for the real boto3."""

from typing import Any

from support.fake_json_service import FakeJSONService


class FakeAWS(FakeJSONService):
    """Answers GetSecretValue and GetParameter from `values`, by ARN; `refusals` names an error code for an ARN."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}  # a dictionary is a whole answer
        self.refusals: dict[str, str] = {}
        self.requests: list[str] = []  # the ARNs asked for
        super().__init__()

    @property
    def variables(self) -> dict[str, str]:
        """The environment in which boto3 talks to this server alone."""
        return {
            "AWS_ENDPOINT_URL_SECRETS_MANAGER": self.endpoint,
            "AWS_ENDPOINT_URL_SSM": self.endpoint,
            "AWS_ACCESS_KEY_ID": "AKIATEST",
            "AWS_SECRET_ACCESS_KEY": "of-the-test",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def answer(self, target: str, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        is_secret = target == "secretsmanager.GetSecretValue"
        assert is_secret or (target == "AmazonSSM.GetParameter" and asked["WithDecryption"])
        arn = asked["SecretId" if is_secret else "Name"]
        self.requests.append(arn)
        if code := self.refusals.get(arn):
            return 400, {"__type": code, "message": f"User: role is not authorized to read {arn}"}
        if arn not in self.values:
            return 400, {"__type": "ResourceNotFoundException" if is_secret else "ParameterNotFound"}
        value = self.values[arn]
        if isinstance(value, dict):
            return 200, value
        return 200, {"SecretString": value} if is_secret else {"Parameter": {"Name": arn, "Value": value}}
