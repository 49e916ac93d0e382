"""What ran where: processor, memory, torch, commit, and how much memory a call takes."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _field(text: str, name: str) -> str | None:
    found = re.search(rf"^{re.escape(name)}\s*:\s*(.*)$", text, re.MULTILINE)
    return found.group(1).strip() if found else None


def _cache_bytes() -> dict[str, int]:
    """Size of each cache that the first core sees."""
    sizes: dict[str, int] = {}
    for index in range(8):
        at = f"/sys/devices/system/cpu/cpu0/cache/index{index}/"
        size, level, kind = (_read(at + name).strip() for name in ("size", "level", "type"))
        if size.endswith("K") and kind != "Instruction":
            sizes[f"L{level}"] = int(size[:-1]) * 1024
    return sizes


def describe(device: str = "cpu") -> dict[str, Any]:
    """The machine, without anything that names it."""
    info = _read("/proc/cpuinfo")
    flags = (_field(info, "flags") or "").split()
    family, model = _field(info, "cpu family"), _field(info, "model")
    wanted = ("avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16")
    kib = _field(_read("/proc/meminfo"), "MemTotal")
    found: dict[str, Any] = {
        "cpu": _field(info, "model name") or platform.processor() or platform.machine(),
        "cpu_family_model": f"{family}/{model}" if family else None,
        "cores": os.cpu_count(),
        "isa": [name for name in wanted if name in flags],
        "cache_bytes": _cache_bytes(),
        "memory_gib": round(int(kib.split()[0]) / 2**20, 1) if kib else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device != "cpu" and torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": facts.name,
            "gpu_capability": f"{facts.major}.{facts.minor}",
            "gpu_multiprocessors": facts.multi_processor_count,
            "gpu_memory_gib": round(facts.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return found


def commit() -> tuple[str | None, bool | None]:
    """The commit of the checkout this runs from, and whether tracked files differ from it; (None, None)
    outside one."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    if head is None:
        return None, None
    changed = git("status", "--porcelain", "--untracked-files=no")
    return head, bool(changed) if changed is not None else None


def memory_of(process: int | str = "self") -> tuple[int, int] | None:
    """Resident memory of a process and its peak so far, in bytes; None where that can't be read."""
    status = _read(f"/proc/{process}/status")
    found = [(_field(status, name) or "").split() for name in ("VmRSS", "VmHWM")]
    return (int(found[0][0]) * 1024, int(found[1][0]) * 1024) if all(found) else None


def peak_extra_bytes(call: Callable[[], object], device: str = "cpu") -> int | None:
    """Most memory during one call beyond what was in use before it, its result included: of torch's allocator
    on a GPU, resident memory elsewhere (Linux only)."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - held
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else the call would reuse pages that still count as resident
        before = int((_field(_read("/proc/self/status"), "VmRSS") or "").split()[0])
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        call()
        peak = int((_field(_read("/proc/self/status"), "VmHWM") or "").split()[0])
    except (OSError, AttributeError, IndexError, ValueError):
        return None
    return max(0, peak - before) * 1024
