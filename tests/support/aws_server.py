# SPDX-License-Identifier: Apache-2.0
"""moto's server on a loopback port, in front of it a record of what is asked, and refusals that a test plans."""

import io
import json
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
from moto.sagemaker.models import sagemaker_backends
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

REGION, ACCOUNT = "us-west-2", "123456789012"  # moto's
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
RESULT = "s3://bucket/output/job-1/output/model"
FINISHED_JOB = {
    "TrainingJobName": "job-1",
    "TrainingJobStatus": "Completed",
    "RoleArn": f"arn:aws:iam::{ACCOUNT}:role/Trainer",
    "ModelArtifacts": {"S3ModelArtifacts": RESULT},
}
JSON = [("Content-Type", "application/x-amz-json-1.1")]


class QuietHandler(WSGIRequestHandler):
    """Prints no line for each request."""

    def log_request(self, *_: Any) -> None:
        pass


@dataclass(frozen=True)
class Asked:
    """One request: the operation, as far as its protocol names it, and its body."""

    operation: str
    method: str
    path: str
    body: bytes

    @property
    def arguments(self) -> dict[str, Any]:
        """The body of a JSON request."""
        return json.loads(self.body)


@dataclass
class AwsServer:
    """AWS on this machine, for boto3 in any process with its `variables`."""

    requests: list[Asked] = field(default_factory=list)
    refusals: dict[str, list[dict[str, str]]] = field(default_factory=dict)  # by operation, in their order
    answers: dict[str, Any] = field(default_factory=dict)  # a function of the arguments, by operation
    held: dict[str, threading.Event] = field(default_factory=dict)  # by operation, or HTTP's method: until when to wait

    def __post_init__(self) -> None:
        self.moto = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self.serve, threaded=True, request_handler=QuietHandler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def variables(self) -> dict[str, str]:
        """The environment in which boto3 talks to this server alone."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": REGION,
            "AWS_CONFIG_FILE": "/nonexistent",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def serve(self, environ: dict[str, Any], start_response: Any) -> Any:
        """Record a request, and answer it as planned, or as moto does."""
        asked = self.record(environ)
        if held := self.held.get(asked.operation or asked.method):
            held.wait()
        if self.refusals.get(asked.operation):
            refusal = self.refusals[asked.operation].pop(0)
            start_response("400 Bad Request", JSON)
            return [json.dumps(refusal).encode()]
        if asked.operation in self.answers:
            answer = self.answers[asked.operation](asked.arguments)
            if answer is not None:
                start_response("200 OK", JSON)
                return [json.dumps(answer).encode()]
        return self.moto(environ, start_response)

    def record(self, environ: dict[str, Any]) -> Asked:
        """Keep what is asked, and give the body back to be read again."""
        is_chunked = environ.get("HTTP_TRANSFER_ENCODING") == "chunked"
        size = -1 if is_chunked else int(environ.get("CONTENT_LENGTH") or 0)
        body = environ["wsgi.input"].read(size)
        environ |= {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
        target = environ.get("HTTP_X_AMZ_TARGET", "").rpartition(".")[2]
        form = re.search(rb"Action=(\w+)", body) if not target and environ["REQUEST_METHOD"] == "POST" else None
        operation = target or (form[1].decode() if form else "")
        if environ["PATH_INFO"].endswith("/invocations"):
            operation = "InvokeEndpoint"
        path = environ["PATH_INFO"] + (f"?{environ['QUERY_STRING']}" if environ["QUERY_STRING"] else "")
        asked = Asked(operation, environ["REQUEST_METHOD"], path, body)
        self.requests.append(asked)
        return asked

    def refuse(self, operation: str, code: str, message: str, times: int = 1) -> None:
        """Answer the next requests of an operation with an error."""
        self.refusals.setdefault(operation, []).extend([{"__type": code, "message": message}] * times)

    def hold(self, operation: str) -> threading.Event:
        """Answer an operation, or the requests of HTTP's method, only when the event is set."""
        return self.held.setdefault(operation, threading.Event())

    def has_been_asked(self, operation: str) -> bool:
        """Tell whether a request of an operation, or of HTTP's method, has come."""
        return any((asked.operation or asked.method) == operation for asked in self.requests)

    def list_arguments(self, operation: str) -> list[dict[str, Any]]:
        """The arguments of each request of an operation, in their order."""
        return [asked.arguments for asked in self.requests if asked.operation == operation]

    def client(self, service: str) -> Any:
        credentials = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
        return boto3.client(service, region_name=REGION, endpoint_url=self.url, **credentials)

    def furnish(self) -> str:
        """Make a bucket, and an image in ECR; return the image's digest."""
        self.client("s3").create_bucket(Bucket="bucket", CreateBucketConfiguration={"LocationConstraint": REGION})
        ecr = self.client("ecr")
        ecr.create_repository(repositoryName="sagemaker-llm-trainer")
        manifest = json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "config": {}, "layers": []})
        image = ecr.put_image(repositoryName="sagemaker-llm-trainer", imageTag="cuda", imageManifest=manifest)
        self.requests.clear()
        return image["image"]["imageId"]["imageDigest"]

    def find_job(self, name: str) -> Any:
        """The job as moto keeps it, which a test may change."""
        return sagemaker_backends[ACCOUNT][REGION].training_jobs[name]

    def put_files(self, uri: str, files: dict[str, bytes | str]) -> None:
        """Put objects below an S3 address."""
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        for name, content in files.items():
            self.client("s3").put_object(Bucket=bucket, Key=f"{prefix.rstrip('/')}/{name}", Body=content)

    def list_uploads(self) -> list[str]:
        """The path of each object that was put, in their order."""
        return [asked.path for asked in self.requests if asked.method == "PUT"]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def start_server() -> Iterator[AwsServer]:
    """Give a server whose account is empty, and end it."""
    server = AwsServer()
    try:
        reset(server.url)
        server.requests.clear()
        yield server
    finally:
        server.close()


def reset(url: str) -> None:
    """Forget all that moto keeps: one account for the whole process."""
    from urllib.request import Request, urlopen

    urlopen(Request(f"{url}/moto-api/reset", method="POST")).close()


def write_rows(folder: Path) -> Path:
    """Write a channel of conversations, and a hidden file that stays here."""
    folder.mkdir(parents=True)
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    (folder / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 16)
    (folder / ".env").write_text("HF_TOKEN=hf_abcdefghijklmnopqrstuvwxyz123456")
    return folder


def rehearse_well(tree: Path, commands: Sequence[str], *asked: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Find nothing wrong with a job, in the place of `validate` and `plan`, which take a while."""
    return {name: {"problems": [], "warnings": [], "instances": []} for name in commands}
