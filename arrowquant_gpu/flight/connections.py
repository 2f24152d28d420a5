"""The TCP connections of a server in this process: Flight gives no way to end a call whose client has gone silent."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote


def cut(port: int, peer: str | None = None) -> int:
    """End the connections that clients have to a port of this process, or that of one peer; returns how many.

    `peer` is as gRPC writes it: "ipv4:127.0.0.1:50123" or "ipv6:%5B::1%5D:50123". Calls on them end as if the client
    had gone.
    """
    ended = 0
    for connection in _accepted(port):
        with connection, contextlib.suppress(OSError):
            host, its_port = connection.getpeername()[:2]
            # An IPv4 client of a socket that listens for both.
            if peer is None or _address(peer) == (host.removeprefix("::ffff:"), its_port):
                connection.shutdown(socket.SHUT_RDWR)
                ended += 1
    return ended


def _accepted(port: int) -> Iterator[socket.socket]:
    """Duplicates of the descriptors whose local port is this one, and which have a peer."""
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            if not str(descriptor.readlink()).startswith("socket:"):
                continue
            # A descriptor that was closed meanwhile may be another's now: what the duplicate is, is looked at after.
            connection = socket.socket(fileno=os.dup(int(descriptor.name)))
        except OSError:
            continue
        try:
            connection.getpeername()
            is_one = connection.family in (socket.AF_INET, socket.AF_INET6) and connection.getsockname()[1] == port
        except OSError:
            is_one = False
        if is_one:
            yield connection
        else:
            connection.close()


def _address(peer: str) -> tuple[str, int]:
    host, _, port = unquote(peer.partition(":")[2]).rpartition(":")
    return host.strip("[]"), int(port)
