# SPDX-License-Identifier: Apache-2.0
"""AWS for the commands that talk to it: a server on this machine."""

import pytest


@pytest.fixture
def aws(monkeypatch):
    from llm_trainer.aws.clients import open_client
    from support.aws_server import start_server  # moto takes a second to import, and few tests need it

    open_client.cache_clear()
    for server in start_server():
        for name, value in server.variables.items():
            monkeypatch.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield server
    open_client.cache_clear()
