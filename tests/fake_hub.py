# SPDX-License-Identifier: Apache-2.0
"""A small HTTP server that plays the Hugging Face Hub: one model or data set, served or refused as a test asks."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MODEL = "tiny/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves a folder as `tiny/model`. Each of `refusals` answers one request, or the only one all of them."""

    def __init__(self, folder: Path, repository: str = MODEL, kind: str = "models") -> None:
        self.repository = repository
        self.address = f"/api/{kind}/{repository}"
        self.files = {file.name: file.read_bytes() for file in folder.iterdir()}
        self.refusals: list[tuple[int, dict[str, str]]] = []
        self.for_good = False
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            def do_HEAD(self) -> None:
                hub.answer(self)

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def refuse(self, status: int, times: int = 0, **headers: str) -> None:
        """Answer with the status from now on, or only so many times."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.refusals = [(status, named)] * (times or 1)
        self.for_good = not times

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        if self.repository not in path:  # other models, and what huggingface_hub asks for on its own behalf
            return send(request, 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        self.requests.append(f"{request.command} {path}")
        self.tokens.add(request.headers.get("Authorization"))
        if self.refusals:
            status, headers = self.refusals[0] if self.for_good else self.refusals.pop(0)
            return send(request, status, {"error": "no"}, headers)
        if path in (f"{self.address}/revision/main", f"{self.address}/revision/{COMMIT}", self.address):
            siblings = [{"rfilename": name} for name in self.files]
            return send(request, 200, {"id": self.repository, "sha": COMMIT, "siblings": siblings, "tags": []})
        if path.startswith(f"{self.address}/tree/{COMMIT}/"):
            return send(
                request, 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}
            )  # it has no folders
        if path.startswith(f"{self.address}/tree/"):
            return send(request, 200, [self.describe_file(name) for name in self.files])
        return self.send_file(request, path.rpartition("/")[2])

    def describe_file(self, name: str) -> dict[str, Any]:
        content = self.files[name]
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def send_file(self, request: BaseHTTPRequestHandler, name: str) -> None:
        if name not in self.files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            return send(request, 404, {"error": "Entry not found"}, headers)
        content = self.files[name]
        return send(request, 200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{self.describe_file(name)["oid"]}"'})


def send(request: BaseHTTPRequestHandler, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
    """Answer with bytes as they are, and with anything else as JSON."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    request.send_response(status)
    for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
        request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)
