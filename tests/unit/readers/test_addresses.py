# SPDX-License-Identifier: Apache-2.0
"""Addresses give files of a bounded size, and nothing from this host or a private network."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from llm_trainer.readers import addresses
from llm_trainer.readers.addresses import FetchError, fetch, is_public


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        self.send_response(404 if self.path == "/gone" else 200)
        self.end_headers()
        self.wfile.write(bytes(1000))

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        server.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def public(monkeypatch, server):
    """A server that stands for one of the internet."""
    monkeypatch.setattr(addresses, "is_public", lambda host: host == "127.0.0.1")
    return server


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *(("8.8.8.8", True), ("2001:4860:4860::8888", True)),
        *(("127.0.0.1", False), ("10.0.0.1", False), ("192.168.1.1", False), ("172.16.0.1", False)),
        *(("169.254.169.254", False), ("169.254.170.2", False), ("100.64.0.1", False), ("0.0.0.0", False)),
        *(
            ("::1", False),
            ("fe80::1%eth0", False),
            ("fd00::1", False),
            ("::ffff:127.0.0.1", False),
            ("224.0.0.1", False),
        ),
    ],
)
def test_addresses_of_networks_of_ones_own_are_not_public(host, expected):
    assert is_public(host) is expected


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_nothing_is_asked_of_a_private_network_by_whatever_name(server, host):
    with pytest.raises(FetchError, match=r"leads to (127\.0\.0\.1|::1) in a private network|Connection refused"):
        fetch(f"http://{host}:{server.server_port}/a", 10**4)
    assert server.asked == []


def test_a_file_comes_whole_also_where_a_server_leads_on_to_it(public):
    assert fetch(f"{public.address}/a", 1000) == bytes(1000)
    assert fetch(f"{public.address}/to//a", 1000) == bytes(1000)


def test_a_file_that_is_too_long_is_not_read_to_its_end(public):
    with pytest.raises(FetchError, match="is longer than 0 MiB"):
        fetch(f"{public.address}/a", 999)


def test_a_server_cannot_lead_on_into_a_private_network(public, monkeypatch):
    seen = []

    def judge(host):
        seen.append(host)
        return len(seen) == 1  # the first server alone

    monkeypatch.setattr(addresses, "is_public", judge)
    with pytest.raises(FetchError, match=r"leads to 127\.0\.0\.1 in a private network"):
        fetch(f"{public.address}/to/{public.address}/secret", 1000)
    assert "/secret" not in public.asked


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://host/a"])
def test_a_server_cannot_lead_on_to_another_scheme(public, target):
    with pytest.raises(FetchError, match=r"scheme|not allowed"):
        fetch(f"{public.address}/to/{target}", 1000)


def test_what_is_not_there_is_told(public):
    with pytest.raises(FetchError, match=r"does not come \(.*404"):
        fetch(f"{public.address}/gone", 1000)
    with pytest.raises(FetchError, match="does not come"):
        fetch("http://[", 1000)


def test_a_proxy_is_asked_instead(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.address)
    assert fetch("http://images.example/a", 1000) == bytes(1000)
    assert server.asked == ["http://images.example/a"]
