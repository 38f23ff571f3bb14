# SPDX-License-Identifier: Apache-2.0
"""Files at addresses of the internet: fetched within bounds, and never from this host or a network of its own.

A row may name any address, and a server may lead on to any other. Credentials of a container are at such addresses.
"""

import http.client
import ipaddress
import time
import urllib.request
from typing import Any

from llm_trainer.common.errors import quote_error

SECONDS = 30  # that a server may keep silent, and four times as long for all of a file
SCHEMES = ("http", "https")
BLOCK_BYTES = 2**18


class FetchError(OSError):
    """A reason why nothing came from an address: the rest of a sentence that begins with it."""


def fetch(address: str, max_bytes: int) -> bytes:
    """Return what is at an http address. Raises FetchError where it does not come, or is longer than that.

    A proxy that the environment names is asked for all addresses, and decides which to reach.
    """
    handlers = () if urllib.request.getproxies() else (OpenHandler, SecureHandler)
    opener = urllib.request.build_opener(*handlers, SameSchemes)
    end = time.monotonic() + 4 * SECONDS
    pieces, size = [], 0
    try:
        with opener.open(address, timeout=SECONDS) as answer:
            while piece := answer.read(BLOCK_BYTES):
                pieces.append(piece)
                size += len(piece)
                if size > max_bytes:
                    raise FetchError(f"is longer than {max_bytes // 2**20} MiB")
                if time.monotonic() > end:
                    raise FetchError(f"does not come within {4 * SECONDS} seconds")
    except FetchError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        told = str(reason) if isinstance(reason, FetchError) else f"does not come ({quote_error(error)})"
        raise FetchError(told) from error
    return b"".join(pieces)


def is_public(host: str) -> bool:
    """Tell whether a numeric address is one of the internet, and not of this host or of a private network."""
    address = ipaddress.ip_address(host.partition("%")[0])
    return address.is_global and not address.is_multicast


def check_peer(connection: http.client.HTTPConnection) -> None:
    """Raise FetchError where a connection leads into a private network. It is closed before anything is sent."""
    host = connection.sock.getpeername()[0]
    if not is_public(host):
        connection.close()
        raise FetchError(f"leads to {host} in a private network, where no image is fetched")


class OpenConnection(http.client.HTTPConnection):
    """A connection to a server of the internet."""

    def connect(self) -> None:
        """Connect. Raises FetchError where the server is in a private network, whatever its name was resolved to."""
        super().connect()
        check_peer(self)


class SecureConnection(http.client.HTTPSConnection):
    """A connection by TLS to a server of the internet."""

    def connect(self) -> None:
        """Connect. Raises FetchError as `OpenConnection` does."""
        super().connect()
        check_peer(self)


class OpenHandler(urllib.request.HTTPHandler):
    """Opener of addresses by such connections."""

    def http_open(self, request: urllib.request.Request) -> Any:
        """Return a server's answer."""
        return self.do_open(OpenConnection, request)


class SecureHandler(urllib.request.HTTPSHandler):
    """Opener of addresses by such connections with TLS."""

    def https_open(self, request: urllib.request.Request) -> Any:
        """Return a server's answer."""
        return self.do_open(SecureConnection, request)


class SameSchemes(urllib.request.HTTPRedirectHandler):
    """Follower of servers that lead on to another address, if that is http or https, too."""

    def redirect_request(self, request: Any, *answer: Any) -> Any:
        """Return the request for the address that ends the answer. Raises FetchError for one of another scheme."""
        scheme = answer[-1].partition(":")[0].lower()
        if scheme not in SCHEMES:
            raise FetchError(f"leads on to an address of the scheme {scheme!r}")
        return super().redirect_request(request, *answer)
