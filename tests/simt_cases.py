"""Cases for the CUDA kernels on the CPU: building tests/simt, writing a case, running it, reading what came out."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++20", "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float64, torch.float16, torch.bfloat16)}
_DTYPES |= {"int64": torch.int64, "int32": torch.int32}


def compiler() -> str | None:
    """The host compiler, or None where there is none."""
    return shutil.which(os.environ.get("CXX", "c++").split()[0])


@functools.cache
def missing() -> str:
    """Why the emulator can't be built here; empty when it can."""
    if compiler() is None:
        return "there is no C++ compiler"
    probe = [compiler() or "c++", *FLAGS, "-x", "c++", "-", "-o", os.devnull]
    done = subprocess.run(probe, input="int main() {}", capture_output=True, text=True)
    return "" if done.returncode == 0 else f"the C++ compiler has no sanitizers: {done.stderr.strip()[-200:]}"


def build(op: str, build_dir: Path, kernels: Path = ROOT / "kernels", flags: Sequence[str] = FLAGS) -> Path:
    """Compile tests/simt/<op>.cpp and what it needs; returns the program.

    A copy of kernels stands beside one of tests/simt, which names the kernels by relative paths: see `copy_sources`.

    Objects and the program are kept in build_dir and compiled again when a source is newer.
    """
    simt = kernels.parent / "tests/simt"
    build_dir.mkdir(parents=True, exist_ok=True)
    newest = max(p.stat().st_mtime for d in (kernels, simt) for p in d.rglob("*") if p.suffix in (".h", ".cuh", ".cpp"))
    shared = [_object(simt / f"{name}.cpp", build_dir, kernels, newest, flags) for name in ("simt", "main")]
    program = build_dir / f"simt_{op}"
    objects = [*shared, _object(simt / f"{op}.cpp", build_dir, kernels, newest, flags)]
    if not program.exists() or program.stat().st_mtime < max(o.stat().st_mtime for o in objects):
        _run([compiler() or "c++", *flags, *map(str, objects), "-o", str(program)])
    return program


def copy_sources(folder: Path) -> Path:
    """Copy kernels and tests/simt into a folder, for a test that plants a bug there; returns the kernels."""
    for part in ("kernels", "tests/simt"):
        shutil.copytree(ROOT / part, folder / part)
    return folder / "kernels"


def _object(source: Path, build_dir: Path, kernels: Path, newest: float, flags: Sequence[str]) -> Path:
    target = build_dir / f"{source.stem}.o"
    if not target.exists() or target.stat().st_mtime < newest:
        include = ["-I", str(source.parent), "-I", str(kernels)]
        _run([compiler() or "c++", *flags, *include, "-c", str(source), "-o", str(target)])
    return target


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[:1])} failed with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def write_case(path: Path, tensors: Mapping[str, Tensor | int | None]) -> None:
    """Write tensors by name; a number becomes an int64 of one element, None is left out."""
    values = {
        k: torch.tensor([v]) if isinstance(v, int) else v.contiguous() for k, v in tensors.items() if v is not None
    }
    with open(path, "wb") as out:
        for name, value in values.items():
            shape = " ".join(str(n) for n in value.shape)
            out.write(f"{name} {str(value.dtype).removeprefix('torch.')} {shape}\n".encode())
        out.write(b"\n")
        for value in values.values():
            out.write(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")


def read_case(path: Path) -> dict[str, Tensor]:
    """Read what a program wrote."""
    raw = path.read_bytes()
    head, _, data = raw.partition(b"\n\n")
    found, at = {}, 0
    for line in head.decode().splitlines():
        name, dtype, *shape = line.split()
        sizes = [int(n) for n in shape]
        count = torch.Size(sizes).numel()
        size = count * _DTYPES[dtype].itemsize
        chunk = bytearray(data[at : at + size])
        found[name] = (
            torch.frombuffer(chunk, dtype=_DTYPES[dtype]).reshape(sizes)
            if count
            else torch.empty(sizes, dtype=_DTYPES[dtype])
        )
        at += size
    return found


class Failed(Exception):
    """The program stopped: a sanitizer's or the emulator's report."""


def run(
    program: Path, folder: Path, cases: Iterable[Mapping[str, Tensor | int | None]], seed: int = 1
) -> tuple[list[dict[str, Tensor]], set[str]]:
    """Run a program on cases; returns the outputs of each, and the names of the kernels that ran."""
    paths = []
    for i, case in enumerate(cases):
        paths.append(folder / f"case{i}")
        write_case(paths[-1], case)
    environ = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([str(program), str(seed), *map(str, paths)], capture_output=True, text=True, env=environ)
    if done.returncode != 0:
        raise Failed(done.stderr)
    return [read_case(Path(f"{p}.out")) for p in paths], set(done.stdout.splitlines())
