# SPDX-License-Identifier: Apache-2.0
"""What a build meets on AWS, stood in for on this machine: ECR, S3, a database of vulnerabilities, a checkout.

`make test-codebuild` runs this in .venv-supply, whose `aws` and `python` are those of CodeBuild's image.
"""

import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import pytest
import requests
from moto.server import ThreadedMotoServer

from support.checkout import SOURCE, Checkout, call
from support.codebuild import REGION

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
START_TIMEOUT_SECONDS = 30
STORAGE = """version: 0.1
storage:
  filesystem:
    rootdirectory: {folder}
http:
  addr: 127.0.0.1:{port}
"""


@dataclass(frozen=True)
class Registry:
    """Debian's docker-registry in ECR's place."""

    address: str
    log: Path

    def list_tags(self, repository: str) -> set[str]:
        """Empty where nothing was ever pushed."""
        answer = requests.get(f"http://{self.address}/v2/{repository}/tags/list", timeout=30)
        return set(answer.json()["tags"]) if answer.ok else set()

    def find_digest(self, repository: str, tag: str) -> str:
        address = f"http://{self.address}/v2/{repository}/manifests/{tag}"
        answer = requests.head(address, headers={"Accept": MANIFEST}, timeout=30)
        answer.raise_for_status()
        return answer.headers["Docker-Content-Digest"]

    def count_pushes(self, repository: str, tag: str) -> int:
        """How often the tag was set. ECR refuses the second time for one that never moves."""
        return self.log.read_text(encoding="utf-8").count(f'"PUT /v2/{repository}/manifests/{tag} ')


@pytest.fixture(scope="session")
def registry(tmp_path_factory) -> Iterator[Registry]:
    program = shutil.which("docker-registry") or pytest.fail("install Debian's package docker-registry first")
    folder = tmp_path_factory.mktemp("registry")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "config.yml").write_text(STORAGE.format(folder=folder, port=port), encoding="utf-8")
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([program, "serve", folder / "config.yml"], stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/v2/", process)
        yield Registry(f"127.0.0.1:{port}", folder / "log")
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(folder / "docker", ignore_errors=True)  # some hundred megabytes of layers


def wait_for(address: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, f"{address} does not answer"
            time.sleep(0.1)


@dataclass(frozen=True)
class Aws:
    """moto's server, and what has the AWS command line and boto3 ask it."""

    url: str

    @property
    def variables(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ENDPOINT_URL": self.url,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/nonexistent",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
        }

    def client(self, service: str) -> Any:
        credentials = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
        return boto3.client(service, region_name=REGION, endpoint_url=self.url, **credentials)

    def make_bucket(self, name: str) -> str:
        self.client("s3").create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": REGION})
        return name

    def list_keys(self, bucket: str) -> list[str]:
        return [entry["Key"] for entry in self.client("s3").list_objects_v2(Bucket=bucket).get("Contents", [])]


@pytest.fixture(scope="session")
def aws_server() -> Iterator[Aws]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield Aws(f"http://{host}:{port}")
    server.stop()


@pytest.fixture
def aws(aws_server) -> Aws:
    requests.post(f"{aws_server.url}/moto-api/reset", timeout=10).raise_for_status()
    return aws_server


@dataclass
class Osv:
    """Answers as OSV's POST /v1/query does (https://google.github.io/osv.dev/post-v1-query/)."""

    url: str
    advisories: dict[str, dict[str, Any]] = field(default_factory=dict)  # by package
    asked: list[dict[str, Any]] = field(default_factory=list)

    def plant(self, package: str, advisory: str, alias: str, fixed: str | None, ecosystem: str = "PyPI") -> None:
        """An advisory on a package; in a distribution `alias` stands under `upstream`, as OSV has it there."""
        events = [{"introduced": "0"}, *([{"fixed": fixed}] if fixed else [])]
        affected = {
            "package": {"name": package, "ecosystem": ecosystem},
            "ranges": [{"type": "ECOSYSTEM", "events": events}],
        }
        self.advisories[package] = {
            "schema_version": "1.7.3",
            "id": advisory,
            "upstream" if ":" in ecosystem else "aliases": [alias],
            "summary": "Planted by the test.",
            "modified": "2026-01-01T00:00:00Z",
            "affected": [affected],
        }

    def answer(self, query: dict[str, Any]) -> dict[str, Any]:
        """The advisory on the second page, as long answers come: the first has none."""
        self.asked.append(query)
        advisory = self.advisories.get(query["package"]["name"])
        if advisory is None or query["package"]["ecosystem"] != advisory["affected"][0]["package"]["ecosystem"]:
            return {}
        if query["package"]["ecosystem"] != "PyPI" and "page_token" not in query:
            return {"next_page_token": "2"}
        return {"vulns": [advisory]}


@pytest.fixture(scope="session")
def osv_server() -> Iterator[Osv]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = json.dumps(database.answer(query)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        database = Osv(f"http://127.0.0.1:{server.server_port}/v1/query")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield database
        server.shutdown()


@pytest.fixture
def osv(osv_server) -> Iterator[Osv]:
    yield osv_server
    osv_server.advisories.clear()


@pytest.fixture(scope="module")
def make_checkout(tmp_path_factory):
    """Clones of HEAD with what CodeBuild would install first: the environments are this checkout's."""

    def make() -> Checkout:
        folder = tmp_path_factory.mktemp("checkout") / "source"
        call("git", "clone", "--quiet", "--no-local", "--no-tags", SOURCE, folder)
        checkout = Checkout(folder)
        (folder / ".git/info/exclude").write_text(".venv\n.venv-supply\n", encoding="utf-8")
        for name in (".venv", ".venv-supply"):
            (folder / name).symlink_to((SOURCE / name).resolve())
        # Not newer than the environments that were made from them, or make would make those again.
        for file in [folder / "pyproject.toml", *folder.glob("docker/requirements/*.txt")]:
            os.utime(file, (0, 0))
        for wheel in SOURCE.glob("docker/wheels/torch-*.whl"):
            (folder / "docker/wheels" / wheel.name).hardlink_to(wheel)
        return checkout

    return make


@pytest.fixture(scope="session")
def docker() -> str:
    return os.environ.get("DOCKER", "docker")


@pytest.fixture(scope="session")
def tools() -> dict[str, str]:
    """PATH with this environment's programs first."""
    return {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
