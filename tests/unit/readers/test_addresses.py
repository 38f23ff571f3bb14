# SPDX-License-Identifier: Apache-2.0
"""Addresses give files of a bounded size, and nothing from this host or a private network."""

import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from llm_trainer.readers import addresses
from llm_trainer.readers.addresses import FetchError, encode_address, fetch, is_public


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        self.send_response(404 if self.path == "/gone" else 200)
        if self.path == "/cut":
            self.send_header("Content-Length", "1001")
        self.end_headers()
        self.wfile.write(bytes(1000))

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        server.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
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
        *(("64:ff9b::a9fe:a9fe", False), ("64:ff9b:1::a00:1", False), ("2002:a00:1::", False), ("::10.0.0.1", False)),
        *(("fec0::1", False), ("fd00:ec2::254", False), ("192.0.0.192", False), ("::ffff:8.8.8.8", True)),
    ],
)
def test_addresses_of_networks_of_ones_own_are_not_public(host, expected):
    assert is_public(host) is expected


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_nothing_is_asked_of_a_private_network_by_whatever_name(server, host):
    with pytest.raises(FetchError, match=r"leads to (127\.0\.0\.1|::1) in a private network|Connection refused"):
        fetch(f"http://{host}:{server.server_port}/a", 10**4)
    assert server.asked == []


@pytest.mark.parametrize(
    "proxies",
    [
        {"no_proxy": "127.0.0.1"},
        {"https_proxy": "http://127.0.0.1:9"},
        {"http_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"},
    ],
)
def test_a_proxy_for_other_addresses_opens_no_way_into_a_private_network(server, monkeypatch, proxies):
    for name, value in proxies.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FetchError, match=r"leads to 127\.0\.0\.1 in a private network"):
        fetch(f"{server.address}/a", 10**4)
    assert server.asked == []


def test_a_private_network_gets_no_greeting_of_tls(server):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        with pytest.raises(FetchError, match="in a private network"):
            fetch(f"https://127.0.0.1:{listening.getsockname()[1]}/a", 10**4)
        connection, _ = listening.accept()
        with connection:
            assert connection.recv(1) == b""


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


def test_a_file_that_is_cut_off_is_told(public):
    with pytest.raises(FetchError, match="ends too early"):
        fetch(f"{public.address}/cut", 10**4)


def test_a_file_that_comes_in_drops_is_told_when_the_time_has_passed():
    answer = SimpleNamespace(read1=lambda _: b"x", length=None)
    with pytest.raises(FetchError, match="does not come within 120 seconds"):
        addresses.read_answer(answer, 10**4, end=0)


def test_a_server_that_never_ends_the_head_of_its_answer_is_left(monkeypatch):
    is_over = threading.Event()
    monkeypatch.setattr(addresses, "ask", lambda *_: is_over.wait())
    monkeypatch.setattr(addresses, "MAX_SECONDS", 0)
    with pytest.raises(FetchError, match="does not come within 120 seconds"):
        fetch("https://host/a", 1000)
    is_over.set()


@pytest.mark.parametrize("lead", ["", "/to/"])
def test_no_user_is_told_to_a_server_or_to_a_person(public, lead):
    address = public.address.replace("//", "//me:pass@")
    with pytest.raises(FetchError, match="names a user, and none is told to a server"):
        fetch(f"{public.address}{lead}{address}/a" if lead else f"{address}/a", 1000)


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd?X-Amz-Signature=5ec2e7", "http://host:port/a?x=5ec2e7", "ftp://h?5ec2e7"]
)
def test_a_reason_has_no_query_of_an_address(public, target):
    for address in (f"{public.address}/to/{target}", target):
        with pytest.raises(FetchError) as error:
            fetch(address, 1000)
        assert "5ec2e7" not in str(error.value)


def test_an_address_is_encoded_where_that_is_missing():
    assert encode_address("https://host/Zwölf a\".png?x=%20&y='1'") == "https://host/Zw%C3%B6lf%20a%22.png?x=%20&y='1'"
    assert encode_address("http://h/\ud800") == "http://h/%5Cud800"


def test_what_is_not_there_is_told(public):
    with pytest.raises(FetchError, match=r"does not come \(.*404"):
        fetch(f"{public.address}/gone", 1000)
    with pytest.raises(FetchError, match="does not come"):
        fetch("http://[", 1000)


def test_a_proxy_is_asked_instead(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.address)
    assert fetch("http://images.example/a", 1000) == bytes(1000)
    assert server.asked == ["http://images.example/a"]


def test_a_proxy_is_asked_for_a_way_to_a_server_of_tls(server, monkeypatch):
    monkeypatch.setenv("https_proxy", server.address)
    with pytest.raises(FetchError, match=r"does not come \(.*501"):
        fetch("https://images.example/a", 1000)
