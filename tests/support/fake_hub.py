# SPDX-License-Identifier: Apache-2.0
"""A small HTTP server that plays the Hugging Face Hub: one model or data set, served or refused as a test asks."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MODEL = "tiny/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves a folder as `tiny/model`. Each of `refusals` answers one request, or the only one all of them.

    It takes a push too, by the protocol without xet: `commits` holds what each made of the files.
    """

    def __init__(self, folder: Path, repository: str = MODEL, kind: str = "models") -> None:
        self.repository = repository
        self.address = f"/api/{kind}/{repository}"
        self.files = {file.name: file.read_bytes() for file in folder.iterdir()}
        self.refusals: list[tuple[int, dict[str, str]]] = []
        self.for_good = False
        self.refused = ""  # part of the paths that refusals are for
        self.told_sizes: dict[str, int] = {}  # bytes by file, where the Hub tells others than it has
        self.role = "write"
        self.uploads: dict[str, bytes] = {}
        self.commits: list[dict[str, bytes]] = []
        self.created: list[dict[str, Any]] = []
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            do_POST = do_PUT = do_GET  # noqa: N815

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
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if request.command in ("POST", "PUT") or path == "/api/whoami-v2":
            return self.answer_push(request, path, body)
        if self.repository not in path:  # other models, and what huggingface_hub asks for on its own behalf
            return send(request, 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        self.requests.append(f"{request.command} {path}")
        self.tokens.add(request.headers.get("Authorization"))
        if self.refusals and self.refused in path:
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
        return self.send_file(request, path.partition("/resolve/")[2].partition("/")[2])

    def answer_push(self, request: BaseHTTPRequestHandler, path: str, body: bytes) -> None:
        self.requests.append(f"{request.command} {path}")
        self.tokens.add(request.headers.get("Authorization"))
        if self.refusals and self.refused in path:
            status, headers = self.refusals[0] if self.for_good else self.refusals.pop(0)
            return send(request, status, {"error": "no"}, headers)
        if path == "/api/whoami-v2":
            return send(request, 200, {"name": "tiny", "auth": {"accessToken": {"role": self.role}}})
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return send(request, 200, {"url": f"{self.endpoint}/{self.repository}"})
        if path == "/api/validate-yaml":
            return send(request, 200, {"errors": [], "warnings": []})
        if "/branch/" in path:
            self.created.append({"branch": path.rpartition("/")[2]})
            return send(request, 200, {})
        if "/preupload/" in path:
            large = (".safetensors",)
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(large) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            return send(request, 200, {"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**thing, "actions": {"upload": {"href": f"{self.endpoint}/upload/{thing['oid']}", "header": {}}}}
                for thing in json.loads(body)["objects"]
            ]
            return send(request, 200, {"transfer": "basic", "objects": objects})
        if path.startswith("/upload/"):
            self.uploads[path.rpartition("/")[2]] = body
            return send(request, 200, {})
        return self.answer_commit(request, body)

    def answer_commit(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        files = {}
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.uploads[value["oid"]]
        self.commits.append(files)
        url = f"{self.endpoint}/{self.repository}/commit/{COMMIT}"
        return send(request, 200, {"commitUrl": url, "commitOid": COMMIT, "success": True})

    def describe_file(self, name: str) -> dict[str, Any]:
        content = self.files[name]
        size = self.told_sizes.get(name, len(content))
        return {"type": "file", "path": name, "size": size, "oid": hashlib.sha1(content).hexdigest()}

    def send_file(self, request: BaseHTTPRequestHandler, name: str) -> None:
        if name not in self.files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            return send(request, 404, {"error": "Entry not found"}, headers)
        content, description = self.files[name], self.describe_file(name)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{description["oid"]}"'}
        if request.command == "HEAD":
            headers["X-Linked-Size"] = str(description["size"])
        return send(request, 200, content, headers)


def send(request: BaseHTTPRequestHandler, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
    """Answer with bytes as they are, and with anything else as JSON."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    request.send_response(status)
    for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
        request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)
