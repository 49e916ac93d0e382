"""What a command says: results on stdout, everything else on stderr, failures in one line each."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from dualcodec_ext._files import reason
from dualcodec_ext.errors import BackendError

Item = TypeVar("Item")
PROGRAM = "dualcodec-ext"
FAILED = 2


def one_line(text: object) -> str:
    """Text with its line breaks taken out and safe to print whatever a file's name holds.

    Args:
        text: anything; its `str` is used.
    Returns:
        One line that UTF-8 can encode.
    """
    return " ".join(str(text).split()).encode("utf-8", "backslashreplace").decode()


def explain(error: BaseException) -> str:
    """An exception as one line for a user.

    Args:
        error: any exception.
    Returns:
        The message alone where it was written for users, else with the exception's type.
    """
    if isinstance(error, MemoryError) or ("alloc" in str(error).lower() and "memory" in str(error).lower()):
        return "not enough memory for a recording of this length in one piece"
    if isinstance(error, OSError) and error.strerror:
        name = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
        return one_line(f"{name}{reason(error)}")
    if isinstance(error, ValueError | ImportError | BackendError) or hasattr(error, "format_message"):
        message = getattr(error, "format_message", lambda: str(error))()
        return one_line(message) or type(error).__name__
    return one_line(f"{type(error).__name__}: {error}")


def debugging() -> bool:
    """Whether errors are raised in full: `DUALCODEC_EXT_DEBUG` is set to something other than 0.

    Returns:
        True or False.
    """
    return os.environ.get("DUALCODEC_EXT_DEBUG", "0") not in ("", "0")


def say_error(text: str) -> None:
    """Prints one line of error to stderr.

    Args:
        text: the line, without the program's name.
    """
    print(f"{PROGRAM}: error: {one_line(text)}", file=sys.stderr)


class Report:
    """Collects what a command did and prints it, as text while it goes on or as JSON at the end.

    Args:
        command: name of the command.
        as_json: one JSON document on stdout instead of text.
    """

    def __init__(self, command: str, as_json: bool) -> None:
        self.command = command
        self.as_json = as_json
        self.results: list[dict[str, Any]] = []
        self.failures: list[tuple[str, str]] = []
        self.facts: dict[str, Any] = {}
        self._notes: list[str] = []
        self._bar: Any = None

    def note(self, text: str) -> None:
        """Says something once on stderr, such as that the weights are untrained.

        Args:
            text: one line.
        """
        if text not in self._notes:
            self._notes.append(text)
            self._print(text, sys.stderr)

    def done(self, result: dict[str, Any], line: str) -> None:
        """Records a result.

        Args:
            result: for JSON.
            line: for people.
        """
        self.results.append(result)
        if not self.as_json:
            self._print(line, sys.stdout)

    def fail(self, name: str, error: BaseException | str) -> None:
        """Records a failure; it is printed by `finish`.

        Args:
            name: the input that failed.
            error: why.
        """
        if isinstance(error, BaseException) and debugging():
            raise error
        text = error if isinstance(error, str) else explain(error)
        self.failures.append((name, text if name in text else f"{name}: {text}"))

    def each(
        self,
        items: Sequence[Item],
        name: Callable[[Item], str],
        work: Callable[[Item], tuple[dict[str, Any], str]],
    ) -> None:
        """Does the work for each item, with a progress bar; one that fails is recorded and the others go on.

        Args:
            items: what to work on.
            name: gives an item's name for the report.
            work: does one item and returns what `done` takes.
        """
        for item in self._progress(items):
            try:
                outcome = work(item)
            except Exception as error:  # whatever one file brings up, the rest of the batch is still wanted
                self.fail(name(item), error)
            else:
                self.done(*outcome)  # not in the try: a closed stdout is no failure of the file

    def finish(self) -> int:
        """Prints the failures, and the JSON document if there is one.

        Returns:
            The exit code: 0 when nothing failed, else 2.
        """
        for _, text in self.failures:
            say_error(text)
        total = len(self.results) + len(self.failures)
        if self.failures and total > 1:
            print(f"{PROGRAM}: {len(self.failures)} of {total} failed, see above", file=sys.stderr)
        if self.as_json:
            failed = [{"input": one_line(name), "error": one_line(text)} for name, text in self.failures]
            print_json(
                {
                    "command": self.command,
                    "ok": not failed,
                    **self.facts,
                    "results": self.results,
                    "failed": failed,
                }
            )
        return FAILED if self.failures else 0

    @contextlib.contextmanager
    def bar(self, what: str, seconds: float) -> Iterator[Callable[[float], object]]:
        """Shows a progress bar while one long recording is worked on, on a terminal.

        Args:
            what: what is done with it.
            seconds: of the recording.
        Yields:
            What to tell of the seconds that were done since the last time.
        """
        if self.as_json or not sys.stderr.isatty():
            yield lambda done_s: None
            return
        from tqdm import tqdm

        below = self._bar is not None  # that of a batch
        layout = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}]"
        options = {"desc": what, "position": int(below), "leave": not below, "bar_format": layout}
        with tqdm(total=seconds, file=sys.stderr, dynamic_ncols=True, **options) as bar:
            yield lambda done_s: bar.update(min(done_s, seconds - bar.n))

    def _progress(self, items: Sequence[Item]) -> Iterable[Item]:
        if self.as_json or len(items) < 2 or not sys.stderr.isatty():
            yield from items
            return
        from tqdm import tqdm

        with tqdm(total=len(items), unit="file", file=sys.stderr, dynamic_ncols=True) as self._bar:
            for item in items:
                yield item
                self._bar.update()
        self._bar = None

    def _print(self, line: str, stream: Any) -> None:
        if self._bar is None:
            print(one_line(line), file=stream)
        else:
            self._bar.write(one_line(line), file=stream)  # above the bar rather than through it


def print_json(document: dict[str, Any]) -> None:
    """Prints one JSON document on stdout.

    Args:
        document: what JSON can hold; numbers must be finite.
    """
    print(json.dumps(document, indent=2, allow_nan=False))


def fatal_json(text: str) -> None:
    """Prints the JSON document of a command that did nothing.

    Args:
        text: why, in one line.
    """
    print_json({"ok": False, "error": one_line(text)})
