"""Cases for the CUDA kernels on the CPU: building tests/simt, writing a case, running it, reading what came out."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build/simt"
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
        return "the CUDA kernels on the CPU need a C++ compiler: install g++, or set CXX"
    probe = [compiler() or "c++", *FLAGS, "-x", "c++", "-", "-o", os.devnull]
    done = subprocess.run(probe, input="int main() {}", capture_output=True, text=True)
    return "" if done.returncode == 0 else f"the C++ compiler has no sanitizers: {done.stderr.strip()[-200:]}"


def program(op: str) -> Path:
    """The program of an op, built when a source is newer; skips the test where it can't be built."""
    if reason := missing():
        pytest.skip(reason)
    return build(op)


def copy_sources(folder: Path) -> Path:
    """Copy kernels/ and tests/simt into a folder, for a bug to be planted there; returns the folder."""
    for part in ("kernels", "tests/simt"):
        shutil.copytree(ROOT / part, folder / part)
    return folder


def build(op: str, build_dir: Path = BUILD, root: Path = ROOT, flags: Sequence[str] = FLAGS) -> Path:
    """Compile tests/simt/<op>.cpp and the kernels that it includes, both as they lie under root; returns the program.

    Objects and the program are kept in build_dir and compiled again when a file that they include is newer. The
    emulator itself is always that of this repository, with FLAGS; `flags` are for the op.
    """
    build_dir.mkdir(parents=True, exist_ok=True)
    target = build_dir / f"simt_{op}"
    objects = [_object(ROOT / f"tests/simt/{name}.cpp", BUILD) for name in ("simt", "fragments", "main")]
    objects.append(_object(root / f"tests/simt/{op}.cpp", build_dir, flags))
    if not target.exists() or target.stat().st_mtime < max(o.stat().st_mtime for o in objects):
        _run([compiler() or "c++", *FLAGS, *map(str, objects), "-o", str(target)])
        # The names of kernels that earlier sources had.
        _ran(target).unlink(missing_ok=True)
    return target


def _object(source: Path, build_dir: Path, flags: Sequence[str] = FLAGS) -> Path:
    build_dir.mkdir(parents=True, exist_ok=True)
    target = build_dir / f"{source.stem}.o"
    included = target.with_suffix(".d")
    if not (target.exists() and included.exists() and _is_newest(target, included)):
        made = build_dir / f"{source.stem}.{os.getpid()}.o"  # another process may want the same object
        include = ["-I", str(source.parent), "-MMD", "-MF", str(included)]
        _run([compiler() or "c++", *flags, *include, "-c", str(source), "-o", str(made)])
        made.rename(target)
    return target


def _is_newest(target: Path, included: Path) -> bool:
    files = included.read_text().partition(":")[2].replace("\\\n", " ").split()
    return all(Path(f).exists() and Path(f).stat().st_mtime <= target.stat().st_mtime for f in files)


def _ran(program: Path) -> Path:
    return program.parent / "ran" / f"{program.name.removeprefix('simt_')}.txt"


def kernels_that_ran() -> dict[str, set[str]]:
    """By op, the names of the kernels that its program ran since it was built."""
    return {path.stem: set(path.read_text().split("\n")) - {""} for path in sorted((BUILD / "ran").glob("*.txt"))}


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
    program: Path, folder: Path, cases: Iterable[Mapping[str, Tensor | int | None]], seed: int = 1, note: bool = True
) -> tuple[list[dict[str, Tensor]], set[str]]:
    """Run a program on cases; returns the outputs of each, and the names of the kernels that ran.

    With `note`, kernels_that_ran will tell the names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, case in enumerate(cases):
        paths.append(folder / f"case{i}")
        write_case(paths[-1], case)
    environ = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([str(program), str(seed), *map(str, paths)], capture_output=True, text=True, env=environ)
    if done.returncode != 0:
        raise Failed(done.stderr)
    names = set(done.stdout.splitlines())
    if note:
        remember(program, names)
    return [read_case(Path(f"{p}.out")) for p in paths], names


def remember(program: Path, names: set[str]) -> None:
    """Add names to those that kernels_that_ran tells; another process may do so at the same time."""
    kept = _ran(program)
    kept.parent.mkdir(exist_ok=True)
    with open(kept, "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        known = set(file.read().splitlines())
        if not names <= known:
            file.truncate(0)
            file.write("\n".join(sorted(known | names)) + "\n")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs agree bit for bit, NaN included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def main() -> None:
    """Build every op's program on all cores, where tests build the one that they need next, on one."""
    if reason := missing():
        print(reason)
        return
    emulator = ("simt", "fragments", "main")
    for name in emulator:
        _object(ROOT / f"tests/simt/{name}.cpp", BUILD)
    ops = sorted({path.stem for path in (ROOT / "tests/simt").glob("*.cpp")} - set(emulator))
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        list(pool.map(build, ops))


if __name__ == "__main__":
    main()
