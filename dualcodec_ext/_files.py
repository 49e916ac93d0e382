"""Files as a command line needs them: found by path, folder or pattern, and written whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import stat
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from dualcodec_ext.errors import DualCodecError


def reason(error: BaseException) -> str:
    """The reason an operating system call failed, in its own words and on one line.

    Args:
        error: an OSError (its `strerror` is used), or any other exception (its text is used).
    Returns:
        One line without the path, such as `no space left on device`.
    """
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    text = " ".join(str(text).split()).removesuffix(".")
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file so that its name shows either the whole of `data` or what was there before.

    Args:
        path: the file to write; its folder must exist. A link is followed, so that it stays a link; something that is
            no plain file, such as a pipe or a device, can't be replaced and is written to directly.
        data: what goes in.
    Raises:
        DualCodecError: the folder is missing, the disk is full, and so on. The temporary file is gone by then.
    """
    target = os.path.realpath(path)
    try:
        mode = os.stat(target).st_mode if os.path.exists(target) else None
        if mode is not None and stat.S_ISDIR(mode):
            raise IsADirectoryError(0, "is a directory")
        if mode is not None and not stat.S_ISREG(mode):
            with open(target, "wb", buffering=0) as sink:
                _write_all(sink.fileno(), data)
            return
        # A short name of its own: the target's may already be as long as the file system allows.
        temporary = os.path.join(os.path.dirname(target), f".dualcodec-{secrets.token_hex(6)}.tmp")
        # Unlike mkstemp's, this file gets the permissions that the user's umask asks for.
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            try:
                _write_all(handle, data)
            finally:
                os.close(handle)
            if mode is not None:
                os.chmod(temporary, stat.S_IMODE(mode))
            os.replace(temporary, target)
        except BaseException:
            # BaseException: Ctrl-C in the middle of a write leaves nothing behind either.
            remove_if_there(temporary)
            raise
    except OSError as error:
        raise DualCodecError(f"cannot write {os.fspath(path)}: {reason(error)}") from error


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view[: 1 << 24]) :]


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
