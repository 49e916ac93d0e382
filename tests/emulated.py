"""The AVX-512 and AMX kernels on a machine without them: `make emulated`.

Their units are compiled for AVX2 with avx512_emulated.h in front, in a copy of the sources, so that everything else
stays as it is; then the C++ checks run, and the tests that go through the instruction sets, with the emulated ones
taken for present. Results are to the bit what the instructions give; times say nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "build" / "emulated"
SOURCES = {".py", ".cpp", ".h", ".cu", ".cuh"}
EMULATED = ("avx512", "avx512_bf16", "amx_bf16")
# As an argument: also where the machine lacks none of them.
ANYWAY = "--anyway"
# A test file is run where it forces each set, by this name or by itself.
FORCES = "instruction_sets()"
MORE = ("test_conformer.py",)


def main(arguments: list[str]) -> int:
    """Build and test; arguments go to pytest, in place of the tests' where they name files."""
    if (reason := why_not()) and ANYWAY not in arguments:
        print(f"emulated: {reason}")
        return 0
    copy_sources()
    emulate(COPY / "kernels/sources.json")
    environment = {**os.environ, "DUALCODEC_EXT_CUDA": "0", "DUALCODEC_EXT_ISA": "", "PYTHONPATH": str(COPY)}
    environment |= {"OMP_WAIT_POLICY": "PASSIVE"}
    files = [name for name in arguments if ".py" in name] or forcing()
    options = [name for name in arguments if ".py" not in name and name != ANYWAY]

    def run(*command: object) -> None:
        done = subprocess.run([str(part) for part in command], cwd=COPY, env=environment)
        if done.returncode:
            raise SystemExit(done.returncode)

    run(sys.executable, "setup.py", "-q", "build_ext", "--inplace")
    run(sys.executable, "-c", CHECK)
    for check in cpp_checks(run):
        run(check)
    processes = ["-n", os.environ.get("TEST_PROCESSES", "2"), "--dist", "loadfile"]
    run(
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--deselect",
        DISASSEMBLES,
        *processes,
        *options,
        *files,
    )
    return 0


def forcing() -> list[str]:
    """Test files that go through the instruction sets."""
    found = [path.name for path in sorted((ROOT / "tests").glob("test_*.py")) if FORCES in path.read_text("utf-8")]
    return [f"tests/{name}" for name in (*found, *MORE)]


def cpp_checks(run: Callable[..., None]) -> Iterator[Path]:
    """Link the C++ checks with the module's own objects."""
    listed = json.loads((COPY / "kernels/sources.json").read_text(encoding="utf-8"))
    flags = [*listed["flags"], listed["x86_define"], "-Ikernels"]
    compiler = os.environ.get("CXX", "c++").split()
    newest = max((COPY / "build").glob("*/kernels/build.ninja"), key=lambda path: path.stat().st_mtime).parent
    units = [f"once/{unit}" for unit in listed["once"]]
    units += [f"{name}/{unit}" for name in listed["isa"] for unit in listed["per_isa"]]
    objects = [newest / f"{unit}.o" for unit in units]
    checks = COPY / "build/checks"
    checks.mkdir(exist_ok=True)
    for name, machine in listed["isa"].items():
        run(*compiler, *flags, *machine, "-c", "tests/cpp/common_checks.cpp", "-o", checks / f"{name}.o")
    own = [checks / f"{name}.o" for name in listed["isa"]]
    for name, more in (("test_common", own), ("test_kernels", [])):
        program = checks / name
        run(*compiler, *flags, "-pthread", f"tests/cpp/{name}.cpp", *more, *objects, "-o", program)
        yield program


# Looks for the emulated instructions in the module.
DISASSEMBLES = "tests/test_isa.py::test_the_module_keeps_instructions_in_their_units"
# That the copy is what is tested, and that it takes the emulated set unasked.
CHECK = f"""
from pathlib import Path
import dualcodec_ext.build as build
module = build.load_module()
assert Path(module.__file__).is_relative_to({str(COPY)!r}), module.__file__
assert module.active_isa() == "amx_bf16", module.active_isa()
"""


def why_not() -> str:
    """Why there is nothing to emulate; empty where there is."""
    from dualcodec_ext.build import load_module

    module = load_module()
    assert module is not None, "make build first"
    features = module.cpu_features()
    if not features["amx_bf16"]["compiled"]:
        return "AVX-512 and AMX are not for this kind of machine"
    if features["amx_bf16"]["detected"]:
        return "this machine has AVX-512 and AMX, their kernels run as they are"
    return "" if features["avx2"]["detected"] else "this machine has no AVX2 to emulate AVX-512 with"


def copy_sources() -> None:
    """Bring what git tracks or would track to COPY, without touching what has not changed; builds there stay.

    Sources there that are gone here are removed.
    """
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    names = {name for name in listed.split("\0") if name and (ROOT / name).is_file()}
    for folder in ("csrc", "kernels", "dualcodec_ext", "tests", "bench"):
        for path in [path for path in (COPY / folder).rglob("*") if path.suffix in SOURCES]:
            if str(path.relative_to(COPY)) not in names:
                path.unlink()
    for name in names - {"kernels/sources.json"}:
        source, target = ROOT / name, COPY / name
        if not target.exists() or source.read_bytes() != target.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            shutil.copymode(source, target)


def emulate(target: Path) -> None:
    """Write the list of sources with AVX2's flags, and the header, for the units of AVX-512."""
    listed = json.loads((ROOT / "kernels/sources.json").read_text(encoding="utf-8"))
    machine = [flag for flag in listed["isa"]["avx2"] if flag.startswith("-m")]
    for name in EMULATED:
        own = [flag for flag in listed["isa"][name] if flag.startswith("-D")]
        listed["isa"][name] = [*own, *machine, "-Wno-psabi", f"--include={COPY}/tests/cpp/avx512_emulated.h"]
    quick = {"-O3": "-O1"}  # to compile; what runs is small
    listed["flags"] = [quick.get(flag, flag) for flag in listed["flags"]] + ["-DDCX_AVX512_EMULATED"]
    text = json.dumps(listed, indent=2) + "\n"
    if not target.exists() or target.read_text(encoding="utf-8") != text:
        target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
