"""The compiled module: loading it, and what `build_info` and `doctor` tell about it.

A text record lies beside the module and is read first: a module that was built for another torch is recognised by it and never
loaded, since loading one ends in missing symbols at best.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.machinery
import importlib.util
import json
import os
import platform
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ._version import __version__

_PACKAGE = Path(__file__).resolve().parent
_RECORD = "_build_record.json"
_DISABLE = "DUALCODEC_EXT_DISABLE_MODULE"
_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps . (in a checkout: make build)"
_CORE = ("numpy", "safetensors", "soundfile", "soxr", "typer", "tqdm")
_EXTRAS = {"semantic": ("transformers",), "hub": ("huggingface_hub",), "plot": ("matplotlib",)}


@dataclasses.dataclass
class _Load:
    module: ModuleType | None
    reason: str | None = None  # why there is no module
    mend: str | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that is wrong with this installation, and what mends it."""

    what: str
    mend: str


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """What `doctor` found; its `str` and its `repr` are the readable report."""

    problems: tuple[Problem, ...]
    text: str

    @property
    def healthy(self) -> bool:
        """Whether nothing needs mending."""
        return not self.problems

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__


_loaded: _Load | None = None


def load_module() -> ModuleType | None:
    """Load the compiled module, once.

    Returns:
        `dualcodec_ext._C`, or None where it is missing or unusable; `unavailable_reason` then tells why. Nothing is raised, nothing is
        compiled and no GPU is touched.
    """
    global _loaded
    if _loaded is None:
        _loaded = _load()
    return _loaded.module


def unavailable_reason() -> str | None:
    """Tell why the compiled module is not there.

    Returns:
        One line, or None when the module is loaded.
    """
    load_module()
    assert _loaded is not None
    return _loaded.reason


def build_info() -> dict[str, Any]:
    """Tell what was built and what can run here.

    Returns:
        A mapping that JSON can carry: `version`, `python`, `platform`, `torch`; `module` (loaded, reason, path); `built`
        (the build record: torch, cuda, cuda_archs, isa, compiler, commit; None without one); `cuda` (torch's version, the device's name
        and capability); `cpu` (compiled, detected, active instruction sets); `backends` (for each: can_run, and reason when it can't).
    """
    import torch

    module = load_module()
    record = _read_record()
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "torch": torch.__version__,
        "module": {
            "loaded": module is not None,
            "reason": unavailable_reason(),
            "path": None if module is None else module.__file__,
        },
        "built": record,
        "cuda": _cuda_info(),
        "cpu": _cpu_info(module),
        "backends": _backends(module, record),
    }


def doctor() -> Report:
    """Examine this installation: what is wrong, and how to mend it.

    Returns:
        A report to print; `healthy` and `problems` are there for programs.
    """
    info = build_info()
    found = tuple(_problems(info))
    return Report(found, "\n".join([*_describe(info), *_verdict(found)]))


def _load() -> _Load:
    if os.environ.get(_DISABLE, "") not in ("", "0"):
        return _Load(None, f"{_DISABLE} is set", f"unset {_DISABLE}")
    unusable = _check_record()
    if unusable is not None:
        return unusable
    try:
        return _Load(importlib.import_module("dualcodec_ext._C"))
    except Exception as error:  # whatever the loader raises, the reference can still run
        text = " ".join(str(error).split())
        return _Load(None, f"the compiled module failed to load: {text}", _REBUILD)


def _check_record() -> _Load | None:
    """What speaks against loading the module that is here; None when nothing does."""
    import torch

    if _module_path() is None:
        others = sorted(path.name for path in _PACKAGE.glob("_C.*") if path.suffix in (".so", ".pyd"))
        if others:
            python = f"{platform.python_implementation()} {platform.python_version()}"
            return _Load(None, f"the compiled module ({others[0]}) is not for this Python ({python})", _REBUILD)
        return _Load(None, "the compiled module was not built", _REBUILD)
    record = _read_record()
    if record is None:
        return _Load(None, f"the build record ({_RECORD}) beside the compiled module is missing or damaged", _REBUILD)
    built, here = _minor(str(record["torch"])), _minor(torch.__version__)
    if built is None or built != here:
        what = f"the compiled module was built for torch {record['torch']}, and this is torch {torch.__version__}"
        return _Load(None, what, f"{_REBUILD}, or install the torch that it was built for")
    built_cuda, here_cuda = record.get("cuda"), torch.version.cuda
    if built_cuda is not None and (here_cuda is None or _major(built_cuda) != _major(here_cuda)):
        found = "has none" if here_cuda is None else f"has CUDA {here_cuda}"
        return _Load(None, f"the compiled module was built for CUDA {built_cuda}, and this torch {found}", _REBUILD)
    return None


def _module_path() -> Path | None:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = _PACKAGE / f"_C{suffix}"
        if path.is_file():
            return path
    return None


def _read_record() -> dict[str, Any] | None:
    try:
        record = json.loads((_PACKAGE / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "torch" in record else None


def _minor(version: str) -> tuple[int, int] | None:
    match = re.match(r"(\d+)\.(\d+)", version)
    return None if match is None else (int(match[1]), int(match[2]))


def _major(version: str) -> int:
    return int(version.partition(".")[0])


def _cpu_info(module: ModuleType | None) -> dict[str, Any]:
    import torch

    if module is None:
        seen = [torch.backends.cpu.get_cpu_capability()]  # torch's own word: ours is in the module
        return {"compiled": [], "detected": seen, "active": None, "error": None}
    features = module.cpu_features()
    return {
        "compiled": [name for name, state in features.items() if state["compiled"]],
        "detected": [name for name, state in features.items() if state["detected"]],
        "active": module.active_isa(),
        "error": module.active_isa_error() or None,
    }


def _cuda_info() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {"torch_cuda": torch.version.cuda, "device": None, "capability": None}
    if torch.version.cuda is not None and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(0)
        facts |= {"device": torch.cuda.get_device_name(0), "capability": f"{major}.{minor}"}
    return facts


def _backends(module: ModuleType | None, record: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    no_module = unavailable_reason()
    no_gpu = _gpu_missing()
    reasons = {
        "cpu": no_module,
        "cuda": no_module or _cuda_missing(record) or no_gpu,
        "triton": _triton_missing() or no_gpu,
        "reference": None,
    }
    return {name: {"can_run": reason is None, "reason": reason} for name, reason in reasons.items()}


def _gpu_missing() -> str | None:
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def _cuda_missing(record: dict[str, Any] | None) -> str | None:
    if record is None or record.get("cuda") is None:
        return "the compiled module has no CUDA code"
    capability = _cuda_info()["capability"]
    if capability is not None and not any(_arch_runs(arch, capability) for arch in record["cuda_archs"]):
        return f"the compiled module has code for {', '.join(record['cuda_archs'])}, and the GPU is {capability}"
    return None


def _arch_runs(arch: str, capability: str) -> bool:
    """Code for 8.0 runs on every 8.x from 8.0 on; 8.0+PTX runs on everything from 8.0 on; 9.0a on 9.0 alone."""
    match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch)
    device = _minor(capability)
    if match is None or device is None:
        return False
    built = (int(match[1]), int(match[2]))
    if match[3] == "a":
        return built == device
    return built <= device and (match[4] is not None or built[0] == device[0])


def _triton_missing() -> str | None:
    if not _has_triton_kernels():
        return "this version has no Triton kernels"
    return None if importlib.util.find_spec("triton") is not None else "triton is not installed"


def _has_triton_kernels() -> bool:
    spec = importlib.util.find_spec("dualcodec_ext.kernels")
    folders = [] if spec is None else spec.submodule_search_locations or []
    return any(next(Path(folder).glob("*/*_triton.py"), None) for folder in folders)


def _problems(info: dict[str, Any]) -> list[Problem]:
    problems = []
    if _loaded is not None and _loaded.reason is not None:
        problems.append(Problem(f"{_loaded.reason}; the slow reference runs instead", _loaded.mend or _REBUILD))
    if info["cpu"]["error"]:
        problems.append(Problem(info["cpu"]["error"], "unset DUALCODEC_EXT_ISA"))
    built = info["built"] or {}
    if info["cuda"]["device"] is not None and info["module"]["loaded"] and _ships_cuda_code():
        reason = info["backends"]["cuda"]["reason"]
        if reason is not None:
            problems.append(Problem(f"the GPU is not used: {reason}", f"DUALCODEC_EXT_CUDA=1 {_REBUILD}"))
    if built.get("version", __version__) != __version__:
        what = f"the compiled module is of version {built['version']}, the package of {__version__}"
        problems.append(Problem(what, _REBUILD))
    for name in _CORE:
        if importlib.util.find_spec(name) is None:
            problems.append(Problem(f"{name} is not installed", f"pip install {name}"))
    return problems


def _ships_cuda_code() -> bool:
    spec = importlib.util.find_spec("dualcodec_ext.kernels")
    folders = [] if spec is None else spec.submodule_search_locations or []
    return any(next(Path(folder).glob("*/*.cuh"), None) for folder in folders)


def _describe(info: dict[str, Any]) -> list[str]:
    built, cpu, cuda = info["built"], info["cpu"], info["cuda"]
    lines = [f"dualcodec-ext {info['version']}, Python {info['python']}, torch {info['torch']}, {info['platform']}"]
    if info["module"]["loaded"]:
        lines.append(f"compiled module: {info['module']['path']}")
        commit = f", commit {built['commit']}" if built.get("commit") else ""
        lines.append(f"  built for torch {built['torch']} by {built.get('compiler') or 'an unknown compiler'}{commit}")
        archs = ", ".join(built["cuda_archs"])
        lines.append(f"  CUDA code: {'none' if built['cuda'] is None else built['cuda'] + ' for ' + archs}")
    else:
        lines.append(f"compiled module: none ({info['module']['reason']})")
    compiled = ", ".join(cpu["compiled"]) or "none"
    lines.append(f"CPU: compiled {compiled}; detected {', '.join(cpu['detected'])}; in use {cpu['active'] or 'none'}")
    device = f"{cuda['device']} ({cuda['capability']})" if cuda["device"] else "none found"
    lines.append(f"GPU: {device}; torch's CUDA: {cuda['torch_cuda'] or 'none'}")
    for name, state in info["backends"].items():
        lines.append(f"backend {name}: {'can run' if state['can_run'] else 'no: ' + state['reason']}")
    for extra, packages in _EXTRAS.items():
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        state = f"{', '.join(missing)} missing: pip install 'dualcodec-ext[{extra}]'" if missing else "installed"
        lines.append(f"extra {extra}: {state}")
    return lines


def _verdict(problems: tuple[Problem, ...]) -> list[str]:
    if not problems:
        return ["Nothing needs mending."]
    lines = []
    for problem in problems:
        lines += [f"PROBLEM: {problem.what}", f"  to mend it: {problem.mend}"]
    return lines
