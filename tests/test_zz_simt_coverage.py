"""Every kernel of the built CUDA module has run on the CPU. Named to come last: it reads what the SIMT tests ran."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import simt_cases

import dualcodec_ext
from dualcodec_ext.build import build_record

MODULE = "DUALCODEC_EXT_CUDA_MODULE"


def cuda_module() -> Path:
    """The module to look into; skips the test where there is none."""
    if os.environ.get(MODULE):
        return Path(os.environ[MODULE])
    record = build_record()
    if record is None or not record.get("cuda"):
        pytest.skip(f"the built module has no CUDA code; {MODULE} may name one that has")
    (found,) = Path(dualcodec_ext.__file__).parent.glob("_C*.so")
    return found


def demangle(name: str) -> str:
    function = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    function.restype = ctypes.c_char_p
    text = function(name.encode(), None, None, ctypes.byref(ctypes.c_int()))
    assert text is not None, name
    return str(text.decode())


def kernels_in(module: bytes) -> set[str]:
    """The K of every run_kernel<K>: a module names each of its kernels to CUDA when it is loaded."""
    mangled = {name.decode() for name in re.findall(rb"\0(_ZN3dcx10run_kernelI\w+)(?=\0)", module)}
    found = [re.fullmatch(r"void dcx::run_kernel<(.+?) ?>\(.*\)", demangle(name)) for name in mangled]
    return {plain(match[1]) for match in found if match is not None}


def plain(name: str) -> str:
    return name.replace(" ", "")


def without_a_case(built: Iterable[str], ran: Iterable[str]) -> list[str]:
    return sorted(set(built) - {plain(name) for name in ran})


def test_every_built_kernel_has_run() -> None:
    module = cuda_module()
    ran = simt_cases.kernels_that_ran()
    programs = {path.stem for path in (simt_cases.ROOT / "tests/simt").glob("*.cpp")} - {"simt", "fragments", "main"}
    if missing := sorted(programs - ran.keys()):
        pytest.skip(f"nothing has run since it was built for {', '.join(missing)}: run tests/test_simt_*.py first")
    built = kernels_in(module.read_bytes())
    assert len(built) >= 20, f"{module} names {len(built)} kernels"
    missing = without_a_case(built, set().union(*ran.values()))
    assert missing == [], "no case of tests/test_simt_*.py, all of which must have run before, started these kernels"


def test_a_kernel_without_a_case_is_found() -> None:
    module = (
        b"\0_ZN3dcx10run_kernelINS_10NarrowConvINS_3f16EEEEEvNT_6ParamsE\0_ZN3dcx10run_kernelINS_6DwconvIfLi8EEEEEv"
    )
    built = kernels_in(module + b"NT_6ParamsE\0other\0")
    assert built == {"dcx::Dwconv<float,8>", "dcx::NarrowConv<dcx::f16>"}
    assert without_a_case(built, ["dcx::Dwconv<float, 8>"]) == ["dcx::NarrowConv<dcx::f16>"]


def test_names_are_kept_between_runs(tmp_path: Path) -> None:
    program = tmp_path / "simt_op"
    for names in ({"b"}, {"a", "b"}):
        simt_cases.remember(program, names)
    assert (tmp_path / "ran/op.txt").read_text() == "a\nb\n"
