"""Signals while audio streams: the first Ctrl-C may be the end of a recording, and what is lost is told."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Iterator
from typing import Any

from dualcodec_ext._cli.report import say_error


class FirstInterrupt:
    """While its block runs, the first SIGINT ends the input; the second raises KeyboardInterrupt as ever.

    A context manager. Where SIGINT is ignored, or out of the main thread, it changes nothing.
    """

    def __init__(self) -> None:
        self._came = False
        self._pipe: tuple[int, int] | None = (
            None  # SIGINT's number comes in here, which a wait sees whatever its timing
        )

    def __enter__(self) -> FirstInterrupt:
        main = threading.current_thread() is threading.main_thread()
        if os.name == "posix" and main and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._pipe = os.pipe()
            for end in self._pipe:
                os.set_blocking(end, False)
            self._handler: Any = signal.signal(signal.SIGINT, self._first)
            self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        return self

    def _first(self, *_: object) -> None:
        self._came = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        if self._pipe is not None:
            signal.set_wakeup_fd(self._wakeup)
            signal.signal(signal.SIGINT, self._handler)
            for end in self._pipe:
                os.close(end)

    def wait(self, handle: int) -> bool:
        """Waits for input.

        Args:
            handle: descriptor that is read from.
        Returns:
            Whether it can be read without waiting; False once SIGINT has come.
        """
        if self._pipe is None:
            return True
        while not self._came:
            ready = select.select([handle, self._pipe[0]], [], [])[0]
            if self._pipe[0] in ready and signal.SIGINT in os.read(self._pipe[0], 64):
                return False
            if handle in ready:
                return True
        return False


@contextlib.contextmanager
def telling(target: str) -> Iterator[None]:
    """Says in one line that a signal ended the work of its block.

    Args:
        target: the file that was to be written, or - for stdout.
    """
    word = ""
    try:
        yield
    except KeyboardInterrupt:
        word = "interrupted"
        raise
    except SystemExit:  # what SIGTERM raises, see cli.main
        word = "terminated"
        raise
    finally:
        if word:
            piped = target == "-" or (os.path.exists(target) and not os.path.isfile(target))
            lost = "before the end of the input" if piped else f"nothing was written to {target}"
            say_error(f"{word} {lost}" if piped else f"{word}, {lost}")
