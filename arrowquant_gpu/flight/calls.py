"""The calls that a server is answering: no more than it may, and none that nothing comes of."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import BusyError

log = logging.getLogger(__name__)

# What a client that was refused is told to wait.
RETRY_SECONDS = 1


class Call:
    """One call: who, what, and how far."""

    def __init__(self, peer: str, what: str) -> None:
        self.peer, self.what, self.rows, self.n_bytes = peer, what, 0, 0
        self.started = self.moved = time.monotonic()

    def received(self, rows: int, n_bytes: int) -> None:
        self.rows, self.n_bytes, self.moved = self.rows + rows, self.n_bytes + n_bytes, time.monotonic()

    def sent(self) -> None:
        self.moved = time.monotonic()

    def describe(self) -> dict[str, Any]:
        seconds = round(time.monotonic() - self.started, 1)
        return {"call": self.what, "peer": self.peer, "rows": self.rows, "bytes": self.n_bytes, "seconds": seconds}


class Calls:
    """Counts calls, and ends those of clients that neither send nor take anything for `idle_timeout` seconds.

    cut: ends the connection of a peer
    """

    def __init__(self, max_clients: int, idle_timeout: float, cut: Callable[[str], object]) -> None:
        self._max_clients, self._idle_timeout, self._cut = max_clients, idle_timeout, cut
        self._lock = threading.Lock()
        self._running: set[Call] = set()
        self._closing = threading.Event()
        self._watch = threading.Thread(target=self._watching, name="idle clients", daemon=True)
        self._watch.start()

    @contextlib.contextmanager
    def running(self, peer: str, what: str) -> Iterator[Call]:
        """A call that counts while the body runs. Raises BusyError."""
        call = Call(peer, what)
        with self._lock:
            if self._closing.is_set():
                raise BusyError("the server is closing")
            if len(self._running) >= self._max_clients:
                raise BusyError(
                    f"{len(self._running)} clients are being served, and this server takes {self._max_clients} at a "
                    f"time (--max-clients); try again in {RETRY_SECONDS} s"
                )
            self._running.add(call)
        log.info("%s of %s begins", what, peer)
        try:
            yield call
        finally:
            with self._lock:
                self._running.discard(call)
            log.info("%s of %s ends: %s", what, peer, call.describe())

    def list(self) -> list[Call]:
        with self._lock:
            return list(self._running)

    def close(self) -> None:
        """Refuse further calls."""
        self._closing.set()
        self._watch.join()

    def _watching(self) -> None:
        while not self._closing.wait(min(1.0, self._idle_timeout / 4)):
            now, moved = time.monotonic(), dict[str, float]()
            for call in self.list():
                moved[call.peer] = max(moved.get(call.peer, 0.0), call.moved)
            for peer, last in moved.items():
                if now - last > self._idle_timeout:
                    log.warning(
                        "%s neither sent nor took anything for %.0f s: its connection is ended", peer, now - last
                    )
                    self._cut(peer)
