"""Files as a command line needs them: found by path, folder or pattern, and written whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import stat
import tempfile
import weakref
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dualcodec_ext.errors import DualCodecError


def reason(error: BaseException) -> str:
    """The reason an operating system call failed, in its own words and on one line.

    Args:
        error: an OSError (its `strerror` is used), one of soundfile's (its `error_string`, which names no stream), or
            any other exception (its text is used).
    Returns:
        One line without the path, such as `no space left on device`.
    """
    told = getattr(error, "strerror", None) or getattr(error, "error_string", None)
    text = told or str(error) or type(error).__name__
    text = " ".join(str(text).split()).removesuffix(".")
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


class AtomicFile:
    """A file that is written as its contents come, and whose name shows the whole of it or what was there before.

    A context manager: the file takes its name when the block ends, and is gone where the block raises.

    Args:
        path: the file to write; its folder must exist. A link is followed, so that it stays a link; something that is
            no plain file, such as a pipe or a device, can't be replaced and is written to directly, at the end.
    Raises:
        DualCodecError: the folder is missing, the disk is full, and so on. The temporary file is gone by then.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        self._target = os.path.realpath(path)
        self._handle: int | None = None
        self._temporary: str | None = None  # None: one without a name
        self._removal: weakref.finalize[..., AtomicFile] | None = None  # of the temporary file, called once
        self._mode: int | None = None

    def __enter__(self) -> AtomicFile:
        with self._explained():
            self._mode = os.stat(self._target).st_mode if os.path.exists(self._target) else None
            if self._mode is not None and stat.S_ISDIR(self._mode):
                raise IsADirectoryError(0, "is a directory")
            self._open()
        return self

    def _open(self) -> None:
        if self._mode is not None and not stat.S_ISREG(self._mode):
            self._handle, name = tempfile.mkstemp(prefix="dualcodec-")
            os.unlink(name)
            return
        # A short name of its own: the target's may already be as long as the file system allows.
        self._temporary = os.path.join(os.path.dirname(self._target), f".dualcodec-{secrets.token_hex(6)}.tmp")
        # A signal's exception may come when the file is there and the block's end isn't yet sure to be reached.
        self._removal = weakref.finalize(self, _remove_own, self._temporary, os.getpid())
        # Unlike mkstemp's, this file gets the permissions that the user's umask asks for.
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        self._handle = os.open(self._temporary, flags, 0o666)

    def write(self, data: bytes | memoryview) -> int:
        """Writes all of `data`, and returns its length."""
        with self._explained():
            _write_all(self._open_handle(), data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As that of a binary file."""
        return os.lseek(self._open_handle(), offset, whence)

    def tell(self) -> int:
        """As that of a binary file."""
        return self.seek(0, os.SEEK_CUR)

    def read(self, count: int) -> bytes:
        """As that of a binary file."""
        return os.read(self._open_handle(), count)

    def _open_handle(self) -> int:
        assert self._handle is not None, "only inside of its block"
        return self._handle

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                with self._explained():
                    self._complete()
        finally:
            # Whatever went wrong, Ctrl-C among it, leaves nothing behind.
            with contextlib.suppress(OSError):
                self._close()
            if self._removal is not None:
                self._removal()

    def _close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)

    def _complete(self) -> None:
        if self._temporary is None:
            with open(self._target, "wb", buffering=0) as sink:
                self.seek(0)
                while data := self.read(1 << 20):
                    _write_all(sink.fileno(), data)
            return
        self._close()
        if self._mode is not None:
            os.chmod(self._temporary, stat.S_IMODE(self._mode))
        os.replace(self._temporary, self._target)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DualCodecError(f"cannot write {self._path}: {reason(error)}") from error


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file so that its name shows either the whole of `data` or what was there before.

    Args:
        path: as for `AtomicFile`.
        data: what goes in.
    Raises:
        DualCodecError: as `AtomicFile`.
    """
    with AtomicFile(path) as file:
        file.write(data)


def _write_all(handle: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view[: 1 << 24]) :]


def _remove_own(path: str, process: int) -> None:
    if os.getpid() == process:  # not a child that was forked while its parent wrote
        remove_if_there(path)


def remove_if_there(path: str) -> None:
    """Removes a file if it is there.

    Args:
        path: the file.
    """
    with contextlib.suppress(OSError):
        os.unlink(path)


@dataclass(frozen=True)
class Found:
    """One input of a batch: the file, and its path below the folder that it was found in."""

    path: Path
    relative: Path


def find_inputs(arguments: Iterable[str], suffixes: Collection[str]) -> tuple[list[Found], list[tuple[str, str]]]:
    """Turns files, folders and glob patterns into a list of files.

    Args:
        arguments: paths as typed. A file is taken whatever its name; a folder gives the files below it that end in one
            of `suffixes`; anything else with `*`, `?` or `[` in it is a pattern (`**` crosses folders).
        suffixes: lower-case name endings, such as `.wav`.
    Returns:
        The files, each once, in the order given and sorted within a folder or pattern; and (argument, reason) for each
        argument that gives none.
    """
    found: dict[str, Found] = {}
    failed: list[tuple[str, str]] = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            files = [Found(file, file.relative_to(path)) for file in _walk(path, suffixes)]
            nothing = f"no file below this folder ends in {_some(suffixes)}"
        elif path.exists() or not glob.has_magic(argument):
            files = [Found(path, Path(path.name))]  # a missing one fails when it is read, with the system's own words
            nothing = ""
        else:
            root = _fixed_part(argument)
            hits = [Path(hit) for hit in sorted(glob.glob(argument, recursive=True))]
            files = [Found(hit, hit.relative_to(root)) for hit in hits if hit.is_file()]
            nothing = "no file matches this pattern"
        if not files:
            failed.append((argument, nothing))
        for file in files:
            found.setdefault(os.path.abspath(file.path), file)
    return list(found.values()), failed


def _walk(folder: Path, suffixes: Collection[str]) -> list[Path]:
    ends = tuple(suffixes)
    hits = [
        Path(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(ends) and not name.startswith(".")
    ]
    return sorted(hits)


def _fixed_part(pattern: str) -> Path:
    fixed: list[str] = []
    for part in Path(pattern).parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return Path(*fixed)


def _some(suffixes: Collection[str]) -> str:
    shown = list(suffixes)[:4]
    return ", ".join(shown) + (", ..." if len(suffixes) > len(shown) else "")
