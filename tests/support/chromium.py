# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium, driven over its DevTools protocol through two pipes: no driver and no library in between."""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from support.waiting import GUARD_SECONDS

EXECUTABLE = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars --no-first-run "
    "--disable-background-networking --disable-component-update --remote-debugging-pipe"
)


class Page:
    """One tab. What it asked the network for, and what it said on its console, is kept."""

    def __init__(self) -> None:
        self.profile = tempfile.mkdtemp()
        commands, self.write_end = os.pipe()
        self.read_end, answers = os.pipe()
        # The protocol is spoken on descriptors 3 and 4. dash could not copy one of two digits.
        script = f'exec "$0" "$@" 3<&{commands} 4>&{answers}'
        self.process = subprocess.Popen(
            ["bash", "-c", script, str(EXECUTABLE), *FLAGS.split(), f"--user-data-dir={self.profile}", "about:blank"],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self.unread = b""
        self.number = 0
        self.session: str | None = None
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.events: list[str] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(target["targetId"] for target in targets if target["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def read(self) -> dict[str, Any]:
        deadline = time.monotonic() + GUARD_SECONDS
        while b"\0" not in self.unread:
            ready, _, _ = select.select([self.read_end], [], [], deadline - time.monotonic())
            assert ready, f"Chromium says nothing for {GUARD_SECONDS} s"
            part = os.read(self.read_end, 1 << 20)
            assert part, "Chromium ended"
            self.unread += part
        line, _, self.unread = self.unread.partition(b"\0")
        message = json.loads(line)
        self.note(message.get("method"), message.get("params", {}))
        return message

    def note(self, method: str | None, parameters: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(parameters["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(parameters["args"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.complaints.append(str(parameters["entry"]))
        elif method:
            self.events.append(method)

    def open(self, file: Path, width: int = 1280, scheme: str = "light") -> None:
        """Load the file and wait until it and its scripts are done."""
        self.requests, self.complaints, self.events = [], [], []
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.emulate(scheme)
        self.call("Page.navigate", url=file.as_uri())
        while "Page.loadEventFired" not in self.events:
            self.read()
        self.settle()

    def emulate(self, scheme: str) -> None:
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.settle()

    def settle(self) -> None:
        """Wait until what follows from a change has been laid out and painted."""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, of a promise when it is kept."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def photograph(self, file: Path) -> None:
        """The whole page as PNG, for a person to look at."""
        image = self.call("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        file.write_bytes(base64.b64decode(image["data"]))

    def print_pdf(self, file: Path) -> None:
        document = self.call("Page.printToPDF", preferCSSPageSize=True, printBackground=False)
        file.write_bytes(base64.b64decode(document["data"]))

    def close(self) -> None:
        os.close(self.write_end)
        self.process.kill()  # its profile is thrown away: it need not end well
        self.process.wait()
        os.close(self.read_end)
        shutil.rmtree(self.profile, ignore_errors=True)
