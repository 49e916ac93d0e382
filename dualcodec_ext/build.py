"""What was built, what can run here, and why not. Imports nothing but the standard library until it is asked."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

_RECORD = Path(__file__).with_name("_build_record.json")
_REBUILD = "rebuild it: pip install --no-build-isolation --force-reinstall --no-deps ."
_state: dict[str, Any] = {}


def build_record() -> dict[str, Any] | None:
    """Return the text record that the build left beside the module; None when there is none."""
    try:
        record = json.loads(_RECORD.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def torch_minor(version: str) -> str:
    """Return "2.13" of "2.13.0+cpu"."""
    return ".".join(version.split("+")[0].split(".")[:2])


def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get("DUALCODEC_EXT_DISABLE_MODULE") == "1":
        return None, "DUALCODEC_EXT_DISABLE_MODULE=1 is set: unset it"
    record = build_record()
    if record is None:
        return None, f"the compiled module was not built: {_REBUILD}"
    import torch

    built, here = torch_minor(str(record.get("torch", ""))), torch_minor(torch.__version__)
    if built != here:
        # Loaded all the same it could crash the process, so the record decides before the module is touched.
        return None, f"the compiled module was built for torch {built}, this is torch {here}: {_REBUILD}"
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    if record.get("python") != python:
        return (
            None,
            f"the compiled module was built for Python {record.get('python')}, this is {python}: {_REBUILD}",
        )
    try:
        return importlib.import_module("dualcodec_ext._C"), ""
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        text = str(error).strip().splitlines()
        return (
            None,
            f"the compiled module can't be loaded ({text[0] if text else type(error).__name__}): {_REBUILD}",
        )


def load_module() -> ModuleType | None:
    """Return the compiled module, loaded once; None when it is missing or unusable. Never raises."""
    if not _state:
        _state["module"], _state["reason"] = _load()
    module: ModuleType | None = _state["module"]
    return module


def unavailable_reason() -> str:
    """Return why there is no compiled module and how to mend it, in one line; empty when there is one."""
    load_module()
    return str(_state["reason"])


def _backends() -> dict[str, str]:
    """Return for each backend why it can't run; empty where it can."""
    import torch

    no_kernels = "this version has no {} kernels"
    gpu = "" if torch.cuda.is_available() else "; no CUDA device is visible either"
    return {
        "cpu": unavailable_reason(),
        "cuda": no_kernels.format("cuda") + gpu,
        "triton": no_kernels.format("triton") + gpu,
        "reference": "",
    }


def build_info() -> dict[str, Any]:
    """Describe the build and this machine.

    Returns:
        version, python, platform, torch, torch_cuda (None for a CPU torch), built (the build's record or None: torch, cuda,
        cuda_archs, compiler, isa, python), cpu ({set: {compiled, detected}}), active_isa (None without the module),
        backends ({name: why it can't run, "" when it can}).
    """
    import torch

    from ._version import __version__

    module = load_module()
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "built": build_record(),
        "cpu": module.cpu_features() if module is not None else {},
        "active_isa": module.active_isa() if module is not None else None,
        "backends": _backends(),
    }


def doctor() -> str:
    """Return a report, several lines, of what can run here, what can't, and how to mend it."""
    info = build_info()
    built = info["built"]
    lines = [
        f"dualcodec-ext {info['version']}, Python {info['python']}, {info['platform']}, torch {info['torch']}",
        f"compiled module: {'usable' if not unavailable_reason() else 'not usable: ' + unavailable_reason()}",
    ]
    if built:
        cuda = (
            f"CUDA {built['cuda']} for {', '.join(built['cuda_archs'])}" if built.get("cuda") else "no CUDA"
        )
        lines.append(f"built with: torch {built.get('torch')}, {built.get('compiler')}, {cuda}")
    for name, facts in info["cpu"].items():
        state = (
            "in use"
            if name == info["active_isa"]
            else "ready"
            if facts["compiled"] and facts["detected"]
            else ""
        )
        why = "not compiled" if not facts["compiled"] else "not on this CPU"
        lines.append(f"instruction set {name}: {state or why}")
    module = load_module()
    if module is not None and module.active_isa_error():
        lines.append(f"instruction set: {module.active_isa_error()}")
    for name, why in info["backends"].items():
        lines.append(f"backend {name}: {why or 'can run'}")
    for package, extra, use in (
        ("transformers", "semantic", "w2v-BERT features"),
        ("huggingface_hub", "hub", "downloads from the hub"),
    ):
        found = importlib.util.find_spec(package) is not None
        lines.append(
            f"{use}: {'ready' if found else f'''need {package}: pip install 'dualcodec-ext[{extra}]' '''.strip()}"
        )
    return "\n".join(lines)
