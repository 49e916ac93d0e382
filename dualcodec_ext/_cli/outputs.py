"""What is checked of the files to be written before any work: that they can be, and that they are no other file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from dualcodec_ext._cli.options import ModelOptions
from dualcodec_ext.errors import DualCodecError, need_extra

# Those that every release of matplotlib writes without help.
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".pdf", ".svg")


def same_file(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> bool:
    """Whether two names are the same plain file, through links too; it need not be there yet.

    Args:
        first, second: paths.
    Returns:
        True or False; False for devices and pipes, which take what several write.
    """
    if os.path.exists(first) and os.path.exists(second):
        return os.path.isfile(first) and os.path.samefile(first, second)
    return os.path.realpath(first) == os.path.realpath(second)


def refuse_clashes(outputs: Mapping[str, Path], inputs: Mapping[str, Path]) -> None:
    """Refuses outputs that would overwrite an input or each other.

    Args:
        outputs, inputs: files by what they are called: an option, or an argument of the command.
    Raises:
        DualCodecError: two are the same file.
    """
    taken = dict(inputs)
    for name, path in outputs.items():
        where = f"{name}: {path}" if name.startswith("--") else str(path)
        for other, used in taken.items():
            if same_file(path, used):
                raise DualCodecError(f"{where}: is {other} as well")
        taken[name] = path


def files_of(options: ModelOptions) -> dict[str, Path]:
    """The files that a model is made of.

    Args:
        options: which model.
    Returns:
        Settings and weights by the option that names them, where these are files rather than names.
    """
    read = {"--model": options.model, "--weights": options.weights}
    paths = {name: Path(text).expanduser() for name, text in read.items() if text}
    return {name: path for name, path in paths.items() if path.is_file()}


def file_keys(paths: Iterable[Path]) -> set[tuple[int, int]]:
    """Identifies plain files whatever they are called.

    Args:
        paths: files; those that are not there are left out.
    Returns:
        A device and an inode for each.
    """
    found = (os.stat(path) for path in paths if path.is_file())
    return {(status.st_dev, status.st_ino) for status in found}


def refuse_picture(path: Path) -> None:
    """Refuses a picture that can't be drawn.

    Args:
        path: what --plot says.
    Raises:
        DualCodecError: its ending is that of no picture.
        MissingExtraError: matplotlib is not installed.
    """
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise DualCodecError(f"--plot: {path} must end in one of {', '.join(PICTURE_SUFFIXES)}")
    need_extra("matplotlib", "plot", "--plot")


def need_folder_of(target: Path) -> None:
    """Refuses a file that can't be made, because a typing error in its name should not cost a minute.

    Args:
        target: the file.
    Raises:
        DualCodecError: it is a folder, or its folder is missing.
    """
    if target.is_dir():
        raise DualCodecError(f"cannot write {target}: is a directory")
    if not target.parent.is_dir():
        raise DualCodecError(f"cannot write {target}: there is no folder {target.parent}")


def refuse_as_folder(folder: Path) -> None:
    """Refuses a folder that is something else.

    Args:
        folder: that results go to.
    Raises:
        DualCodecError: it is there and no folder.
    """
    if folder.exists() and not folder.is_dir():
        raise DualCodecError(f"cannot write to {folder}: is not a folder")
