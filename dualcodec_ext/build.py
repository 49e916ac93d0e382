"""The compiled module: loading it, and what was built, what can run here, and why not.

A text record lies beside the module and is read first: a module that was built for another torch is
recognised by it and never loaded, since that could crash the process. Importing this file needs the standard
library alone.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from ._version import __version__

_PACKAGE = Path(__file__).resolve().parent
_RECORD = "_build_record.json"
_DISABLE = "DUALCODEC_EXT_DISABLE_MODULE"
_REBUILD = "rebuild it: pip install --no-build-isolation --force-reinstall --no-deps ."
_OLDEST_TRITON = (3, 6)
_CORE = ("numpy", "safetensors", "soundfile", "soxr", "typer", "tqdm")
_EXTRAS = {
    "semantic": ("transformers", "w2v-BERT features"),
    "hub": ("huggingface_hub", "downloads from the hub"),
}


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


_loaded: tuple[ModuleType | None, Problem | None] | None = None


def load_module() -> ModuleType | None:
    """Load the compiled module, once.

    Returns:
        `dualcodec_ext._C`, or None where it is missing or unusable; `unavailable_reason` then tells why.
        Nothing is raised, nothing is compiled and no GPU is touched.
    """
    return _load_once()[0]


def unavailable_reason() -> str:
    """Return why there is no compiled module and how to mend it, in one line; empty when there is one."""
    problem = _load_once()[1]
    return "" if problem is None else f"{problem.what}: {problem.mend}"


def build_record() -> dict[str, Any] | None:
    """Return the text record that the build left beside the module; None when there is none."""
    try:
        record = json.loads((_PACKAGE / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def build_info() -> dict[str, Any]:
    """Tell what was built and what can run here, in values that JSON can carry.

    Returns:
        version, python, platform, torch, torch_cuda (None for a CPU torch), device (the GPU's name and
        capability, or None), module (its path, or None when it is not loaded), built (the build's record or
        None: version, torch, cuda, cuda_archs, compiler, isa, python, platform, commit), cpu
        ({set: {compiled, detected}}; empty without the module), active_isa (None without the module),
        backends ({name: why it can't run, "" when it can}).
    """
    import torch

    module = load_module()
    record = build_record()
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "device": _device(),
        "module": None if module is None else module.__file__,
        "built": record,
        "cpu": {} if module is None else module.cpu_features(),
        "active_isa": None if module is None else module.active_isa(),
        "backends": _backends(record),
    }


def doctor() -> Report:
    """Examine this installation: what is wrong, and how to mend it.

    Returns:
        A report to print; `healthy` and `problems` are there for programs.
    """
    info = build_info()
    found = tuple(_problems(info))
    return Report(found, "\n".join([*_describe(info), *_verdict(found)]))


def _load_once() -> tuple[ModuleType | None, Problem | None]:
    global _loaded
    if _loaded is None:
        _loaded = _load()
    return _loaded


def _load() -> tuple[ModuleType | None, Problem | None]:
    if os.environ.get(_DISABLE, "") not in ("", "0"):
        return None, Problem(f"{_DISABLE} is set", f"unset {_DISABLE}")
    what = _misfit()
    if what is None:
        try:
            return _told_of_isa(importlib.import_module("dualcodec_ext._C")), None
        except Exception as error:  # whatever the loader raises, the reference can still run
            why = " ".join(str(error).split()) or type(error).__name__
            what = f"the compiled module can't be loaded ({why})"
    return None, Problem(what, _REBUILD)


def _told_of_isa(module: ModuleType) -> ModuleType:
    why = module.active_isa_error()
    if why:
        logging.getLogger("dualcodec_ext").warning("%s: %s runs instead", why, module.active_isa())
    return module


def _misfit() -> str | None:
    """What speaks against loading the module that lies here; None when nothing does."""
    import torch

    modules = [_PACKAGE / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    module = next((path for path in modules if path.is_file()), None)
    if module is None:
        others = sorted(path.name for path in _PACKAGE.glob("_C.*") if path.suffix in (".so", ".pyd"))
        if others:
            python = f"{platform.python_implementation()} {platform.python_version()}"
            return f"the compiled module ({others[0]}) is not for this Python ({python})"
        return "the compiled module was not built"
    record = build_record()
    if record is None:
        return f"the record beside the compiled module ({_RECORD}) is missing or damaged"
    built = str(record.get("torch"))
    if not _pair(built) or _pair(built) != _pair(torch.__version__):
        return f"the compiled module was built for torch {built}, and this is torch {torch.__version__}"
    if _cut_short(module):
        return f"the compiled module ({module.name}) is cut short"
    cuda, here = record.get("cuda"), torch.version.cuda
    if cuda is not None and (here is None or _pair(cuda)[:1] != _pair(here)[:1]):
        return f"the compiled module was built for CUDA {cuda}, and this torch has {here or 'none'}"
    return None


def _cut_short(module: Path) -> bool:
    """Whether an ELF file ends before its table of sections, which comes last: loading it would kill the process."""
    with open(module, "rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":  # not 64-bit, little-endian
        return False  # which the loader refuses in words
    table = int.from_bytes(header[40:48], "little")
    size, count = (int.from_bytes(header[i : i + 2], "little") for i in (58, 60))
    return module.stat().st_size < table + size * count


def _pair(version: str) -> tuple[int, ...]:
    """(2, 13) of "2.13.0+cpu"; empty when it is no version."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return () if match is None else (int(match[1]), int(match[2]))


def _device() -> dict[str, str] | None:
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    return {"name": torch.cuda.get_device_name(0), "capability": f"{major}.{minor}"}


def _backends(record: dict[str, Any] | None) -> dict[str, str]:
    """For each backend why it can't run; empty where it can."""
    import torch

    no_gpu = "" if torch.cuda.is_available() else "torch finds no CUDA device"
    if torch.version.cuda is None:
        no_gpu = f"torch {torch.__version__} has no CUDA"
    return {
        "cpu": unavailable_reason(),
        "cuda": unavailable_reason() or _no_cuda_code(record) or no_gpu,
        "triton": _no_triton() or ("" if triton_interprets() else no_gpu),
        "reference": "",
    }


def _no_cuda_code(record: dict[str, Any] | None) -> str:
    if record is None or record.get("cuda") is None:
        return "the compiled module has no CUDA code"
    device = _device()
    archs = record.get("cuda_archs") or []
    if device is not None and not any(_arch_runs(arch, device["capability"]) for arch in archs):
        return f"the compiled module has code for {', '.join(archs)}, and the GPU is {device['capability']}"
    return ""


def _arch_runs(arch: str, capability: str) -> bool:
    """8.0 runs on every 8.x from 8.0 on, 8.0+PTX on everything from 8.0 on, 9.0a on 9.0 alone."""
    match = re.fullmatch(r"(\d+\.\d+)([af]?)(\+PTX)?", arch)
    if match is None:
        return False
    built, here = _pair(match[1]), _pair(capability)
    if match[2] == "a":
        return built == here
    return built <= here and (match[3] is not None or built[0] == here[0])


def triton_interprets() -> bool:
    """Return whether Triton kernels run in its interpreter: on the CPU, on tensors of any device, and slowly."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _no_triton() -> str:
    if not _kernels_hold("*/*_triton.py"):
        return "this version has no Triton kernels"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""  # torch brings it under another name for some platforms
    oldest = ".".join(map(str, _OLDEST_TRITON))
    return "" if _pair(version) >= _OLDEST_TRITON else f"triton is {version}, and {oldest} or newer is needed"


def _kernels_hold(pattern: str) -> bool:
    spec = importlib.util.find_spec("dualcodec_ext.kernels")
    folders = [] if spec is None else spec.submodule_search_locations or []
    return any(next(Path(folder).glob(pattern), None) is not None for folder in folders)


def _problems(info: dict[str, Any]) -> list[Problem]:
    problems = []
    module, unusable = _load_once()
    if unusable is not None:
        problems.append(Problem(f"{unusable.what}; the slow reference runs instead", unusable.mend))
    if module is not None and module.active_isa_error():
        problems.append(Problem(module.active_isa_error(), "unset DUALCODEC_EXT_ISA"))
    built = info["built"] or {}
    if module is not None and str(built.get("version")).partition("+")[0] != __version__:
        what = f"the compiled module is of version {built.get('version')}, the package of {__version__}"
        problems.append(Problem(what, _REBUILD))
    if module is not None and info["device"] is not None and _kernels_hold("*/*.cuh"):
        reason = info["backends"]["cuda"]
        if reason:
            problems.append(Problem(f"the GPU is not used: {reason}", f"with DUALCODEC_EXT_CUDA=1, {_REBUILD}"))
    asked = os.environ.get("DUALCODEC_EXT_BACKEND") or "auto"
    known = {"auto": "", **info["backends"]}
    why = known.get(asked, f"it must be one of {', '.join(known)}")
    if why and asked != "auto":
        problems.append(Problem(f"DUALCODEC_EXT_BACKEND={asked} can't be met: {why}", "unset DUALCODEC_EXT_BACKEND"))
    for name in _CORE:
        if importlib.util.find_spec(name) is None:
            problems.append(Problem(f"{name} is not installed", f"pip install {name}"))
    return problems


def _describe(info: dict[str, Any]) -> list[str]:
    built, device = info["built"], info["device"]
    lines = [f"dualcodec-ext {info['version']}, Python {info['python']}, torch {info['torch']}, {info['platform']}"]
    if info["module"] is None:
        lines.append("compiled module: not usable")
    else:
        lines.append(f"compiled module: {info['module']}")
        commit = f", commit {built['commit']}" if built.get("commit") else ""
        lines.append(f"  built for torch {built['torch']} by {built.get('compiler')}{commit}")
        archs = "none" if built.get("cuda") is None else f"{built['cuda']} for {', '.join(built['cuda_archs'])}"
        lines.append(f"  CUDA code: {archs}")
        if "7.5" in (built.get("cuda_archs") or []):
            lines.append("  7.5: float32 and float16 kernels alone, those GPUs have no bfloat16 tensor cores")
    for name, facts in info["cpu"].items():
        state = "ready" if facts["detected"] else "this machine lacks it"
        if not facts["compiled"]:
            state = "not compiled"
        lines.append(f"instruction set {name}: {'in use' if name == info['active_isa'] else state}")
    gpu = "none" if device is None else f"{device['name']}, capability {device['capability']}"
    lines.append(f"GPU: {gpu}")
    if triton_interprets():
        lines.append("TRITON_INTERPRET is set: Triton kernels are interpreted on the CPU")
    lines += [f"backend {name}: {'no, ' + why if why else 'can run'}" for name, why in info["backends"].items()]
    for extra, (package, use) in _EXTRAS.items():
        missing = importlib.util.find_spec(package) is None
        need = f"{package} is not installed: pip install 'dualcodec-ext[{extra}]'" if missing else "ready"
        lines.append(f"{use}: {need}")
    return lines


def _verdict(problems: tuple[Problem, ...]) -> list[str]:
    if not problems:
        return ["Nothing needs mending."]
    return [f"PROBLEM: {problem.what}\n  to mend it: {problem.mend}" for problem in problems]
