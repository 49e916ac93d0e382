"""The PyPI package's model class, where it is installed: what `verify`, tests and benches compare with."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import threading
import types
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_lock = threading.RLock()
_MODULE = "dualcodec.model_codec.dualcodec_model"


def load_peer() -> type[Any] | None:
    """Loads the class `DualCodec` of the PyPI package `dualcodec`.

    Its package imports an audio toolbox, a TTS stack and a configuration system that the model itself has no use for.
    Only the model's files are executed, with empty stand-ins for what surrounds them.

    Returns:
        The class, or None where it can't be had; `find_peer` says why.
    """
    return find_peer()[0]


@cache
def find_peer() -> tuple[type[Any] | None, str]:
    """Loads the class `DualCodec` of the PyPI package, and says which one or why not.

    The package is looked for among the installed ones, then in the folders that the environment variable
    DUALCODEC_EXT_PEERS names (separated as in PATH; each holds a folder `dualcodec`, and beside it what that
    imports and nobody installed; `make peers` makes one).

    Returns:
        (class, `dualcodec 0.4.2`) or (None, the reason).
    """
    loaded = sys.modules.get(_MODULE)
    if loaded is not None:
        return loaded.DualCodec, _version()
    folder = _package_folder()
    if folder is None:
        return None, "dualcodec is not installed"
    try:
        with _lock, _stand_ins(folder):
            return importlib.import_module(_MODULE).DualCodec, _version()
    except Exception as error:  # someone else's code at import: whatever it brings up means that it can't be had
        text = " ".join(str(error).split())
        return None, f"dualcodec can't be imported: {type(error).__name__}: {text}"


def _package_folder() -> str | None:
    try:
        spec = importlib.util.find_spec("dualcodec")
    except (ImportError, ValueError):
        spec = None
    if spec is not None and spec.submodule_search_locations:
        candidates = list(spec.submodule_search_locations)
    else:
        roots = os.environ.get("DUALCODEC_EXT_PEERS", "").split(os.pathsep)
        candidates = [os.path.join(root, "dualcodec") for root in roots if root]
    for folder in candidates:
        if os.path.isfile(os.path.join(folder, "model_codec", "dualcodec_model.py")):
            return folder
    return None


@contextmanager
def _stand_ins(folder: str) -> Iterator[None]:
    from torch import nn

    def module(name: str, path: str | None = None, **names: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        if path is not None:
            made.__path__ = [path]
        for key, value in names.items():
            setattr(made, key, value)
        return made

    base_model = type("BaseModel", (nn.Module,), {})
    stand_ins = {
        "dualcodec": module("dualcodec", folder),
        "dualcodec.model_codec": module("dualcodec.model_codec", os.path.join(folder, "model_codec")),
        "audiotools": module("audiotools", "", AudioSignal=type("AudioSignal", (), {})),
        "audiotools.ml": module("audiotools.ml", BaseModel=base_model),
    }
    hidden = {
        name: sys.modules[name] for name in list(sys.modules) if name.split(".")[0] in ("dualcodec", "audiotools")
    }
    for name in hidden:
        del sys.modules[name]
    sys.modules.update(stand_ins)
    path = list(sys.path)
    sys.path.append(os.path.dirname(folder))  # last, so that what is installed comes first
    try:
        yield
    finally:
        sys.path[:] = path
        # The class keeps its modules alive. Left in sys.modules, the stand-ins would break a later `import dualcodec`.
        for name in list(sys.modules):
            if name.split(".")[0] in ("dualcodec", "audiotools"):
                del sys.modules[name]
        sys.modules.update(hidden)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"dualcodec {version('dualcodec')}"
    except PackageNotFoundError:
        return "dualcodec (a copy without version)"
