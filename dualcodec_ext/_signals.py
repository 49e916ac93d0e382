"""Signals that wait while a C library is at work."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def signals_later() -> Iterator[None]:
    """Have SIGINT and SIGTERM wait for the end of the block, whose handlers run then.

    What a handler raises within a callback of a C library, such as libsndfile's to read and write, is lost there, and
    with it the signal. In the main thread alone, where handlers run; a signal without one does what it does.
    """
    came: list[tuple[int, FrameType | None]] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        handlers = {number: handler for number, handler in found.items() if callable(handler)}
    try:
        for number in handlers:
            signal.signal(number, lambda *given: came.append(given))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for given, frame in came:
            now = signal.getsignal(given)  # the first call may have changed it
            if callable(now):
                now(given, frame)
