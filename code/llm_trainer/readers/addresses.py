# SPDX-License-Identifier: Apache-2.0
"""Files at addresses of the internet: fetched within bounds, and never from this host or a network of its own.

A row may name any address, and a server may lead on to any other. Credentials of a container are at such addresses.
"""

import http.client
import ipaddress
import queue
import threading
import time
import urllib.request
from typing import Any
from urllib.parse import quote, urlsplit

from llm_trainer.common.errors import quote_error
from llm_trainer.common.redaction import hide_queries

SILENT_SECONDS, MAX_SECONDS = 30, 120  # that a server may keep silent, and that all of a file may take
TOO_LATE = f"does not come within {MAX_SECONDS} seconds"
SCHEMES = ("http", "https")
BLOCK_BYTES = 2**18
KEPT_CHARACTERS = "%/:=&?~#+!$,;'@()*[]"  # besides letters and digits, in an address that is written as it is asked
# What ipaddress takes for public: addresses of protocols, and those of version 6 that may stand for one of version 4.
INTERNET_6, RELAYS = ipaddress.IPv6Network("2000::/3"), ipaddress.IPv6Network("2002::/16")
PROTOCOLS = ipaddress.IPv4Network("192.0.0.0/24")


class FetchError(OSError):
    """A reason why nothing came from an address: the rest of a sentence that begins with it."""


def encode_address(address: str) -> str:
    """Return an address as it is asked, with white space, quotes and letters beyond ASCII as their codes."""
    return quote(address, safe=KEPT_CHARACTERS, errors="backslashreplace")


def fetch(address: str, max_bytes: int) -> bytes:
    """Return what is at an encoded address. Raises FetchError where it does not come in time, or is longer than that.

    A proxy that the environment names for it is asked instead, and decides which addresses to reach.
    """
    answers: queue.SimpleQueue[bytes | FetchError] = queue.SimpleQueue()
    # A thread, since a server may also send the head of its answer, and its greeting, a byte at a time.
    threading.Thread(target=lambda: answers.put(ask(address, max_bytes)), daemon=True).start()
    try:
        answer = answers.get(timeout=MAX_SECONDS)
    except queue.Empty:
        raise FetchError(TOO_LATE) from None
    if isinstance(answer, FetchError):
        raise answer
    return answer


def ask(address: str, max_bytes: int) -> bytes | FetchError:
    """Return what a server answers, or why it gives nothing."""
    opener = urllib.request.build_opener(OpenHandler, SecureHandler, CheckedRedirects)
    end = time.monotonic() + MAX_SECONDS
    try:
        check_address(address)
        with opener.open(address, timeout=SILENT_SECONDS) as answer:
            return read_answer(answer, max_bytes, end)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, FetchError):
            return reason
        return FetchError(f"does not come ({hide_queries(quote_error(error))})")


def read_answer(answer: http.client.HTTPResponse, max_bytes: int, end: float) -> bytes:
    """Return the body of an answer. Raises FetchError where it is too long, cut off, or late."""
    pieces, size = [], 0
    while piece := answer.read1(BLOCK_BYTES):
        pieces.append(piece)
        size += len(piece)
        if size > max_bytes:
            raise FetchError(f"is longer than {max_bytes // 2**20} MiB")
        if time.monotonic() > end:
            raise FetchError(TOO_LATE)
    if answer.length:
        raise FetchError("ends too early")
    return b"".join(pieces)


def check_address(address: str) -> None:
    """Raise FetchError where an address is none of http, or names a user."""
    parts = urlsplit(address)
    if parts.scheme not in SCHEMES:
        raise FetchError(f"leads to an address of the scheme {parts.scheme!r}")
    if "@" in parts.netloc:
        raise FetchError("names a user, and none is told to a server")


def is_public(host: str) -> bool:
    """Tell whether a numeric address is one of the internet, and not of this host or of a private network."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return is_public(str(address.ipv4_mapped))
        return address.is_global and address in INTERNET_6 and address not in RELAYS
    return address.is_global and not address.is_multicast and address not in PROTOCOLS


class OpenConnection(http.client.HTTPConnection):
    """A connection to a server of the internet."""

    def connect(self) -> None:
        """Connect. Raises FetchError where the server is in a private network, whatever its name was resolved to.

        The connection is closed before anything is sent.
        """
        super().connect()
        host = self.sock.getpeername()[0]
        if not is_public(host):
            self.close()
            raise FetchError(f"leads to {host} in a private network, where no image is fetched")


class SecureConnection(http.client.HTTPSConnection, OpenConnection):
    """A connection by TLS to a server of the internet. Its greeting is sent after the check."""


class OpenHandler(urllib.request.HTTPHandler):
    """Opener of addresses by such connections."""

    def http_open(self, request: urllib.request.Request) -> Any:
        """Return a server's answer."""
        return self.do_open(http.client.HTTPConnection if is_proxied(request) else OpenConnection, request)


class SecureHandler(urllib.request.HTTPSHandler):
    """Opener of addresses by such connections with TLS."""

    def https_open(self, request: urllib.request.Request) -> Any:
        """Return a server's answer."""
        return self.do_open(http.client.HTTPSConnection if is_proxied(request) else SecureConnection, request)


def is_proxied(request: urllib.request.Request) -> bool:
    """Tell whether a proxy is asked, which may be in a private network: in its own words, or for a way through it."""
    return request.has_proxy() or getattr(request, "_tunnel_host", None) is not None


class CheckedRedirects(urllib.request.HTTPRedirectHandler):
    """Follower of servers that lead on to another address, if that is one that is asked."""

    def redirect_request(self, request: Any, *answer: Any) -> Any:
        """Return the request for the address that ends the answer. Raises FetchError as `check_address` does."""
        check_address(answer[-1])
        return super().redirect_request(request, *answer)
