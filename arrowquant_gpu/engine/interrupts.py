"""`no_interrupt`: threads are started as a whole or not at all."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def no_interrupt() -> Iterator[None]:
    """Signals wait until the body, which starts threads, has ended: one whose start was interrupted may run all the
    same, and nobody would join it.

    Held by their handlers, not blocked: a signal that this thread blocks goes to one of NumPy's, and interrupts all the
    same. Python runs handlers in the main thread only, so the others have nothing to hold.
    """
    # What other code than Python's handles (None) cannot be put back.
    before = {number: handler for number in SIGNALS if (handler := signal.getsignal(number)) is not None}
    if threading.current_thread() is not threading.main_thread():
        before = {}
    held: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(number)

    try:
        for number in before:
            signal.signal(number, hold)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in held:
            signal.raise_signal(late)
