"""Triton's ops in Triton's interpreter, in a process of their own, and how a process comes to Triton."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dualcodec_ext as dx
from dualcodec_ext.ops import _choice, _common, _library

ROOT = Path(__file__).resolve().parents[1]
FILES = ("causal_dwconv1d", "snake_upsample1d", "rvq")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "DUALCODEC_EXT_BACKEND": "", "TRITON_INTERPRET": "1", **env}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=variables)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[subprocess.Popen[bytes], Path]]]:
    """tests/triton_ops under TRITON_INTERPRET=1: one process a file, all at once, and where each one writes."""
    variables = {**os.environ, "TRITON_INTERPRET": "1", "DUALCODEC_EXT_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
    # The interpreter's products are NumPy's. OpenBLAS's for AVX2 give a row other bits in another place of a tile; its
    # oldest ones do not. Other machines' NumPy takes no notice.
    variables["OPENBLAS_CORETYPE"] = "Prescott"
    folder, runs = tmp_path_factory.mktemp("interpreted"), {}
    for name in FILES:
        path = ROOT / "tests/triton_ops" / f"test_triton_{name}.py"
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(path)]
        with open(folder / name, "wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=variables, cwd=ROOT)
        runs[name] = (process, folder / name)
    yield runs
    for process, _ in runs.values():
        process.kill()
        process.wait()


@needs_triton
@pytest.mark.parametrize("name", FILES)
def test_interpreted(name: str, interpreted: dict[str, tuple[subprocess.Popen[bytes], Path]]) -> None:
    process, output = interpreted[name]
    status = process.wait()
    text = output.read_text()
    print(text[-8000:])
    assert status == 0 and " passed" in text and "skipped" not in text


def test_every_file_is_interpreted() -> None:
    assert {f"test_triton_{name}.py" for name in FILES} == {p.name for p in ROOT.glob("tests/triton_ops/test_*.py")}


def test_the_schemas_are_the_compiled_modules() -> None:
    for name, schema in _library.SCHEMAS.items():
        ours = str(getattr(torch.ops.dualcodec_ext_triton, name).default._schema)
        theirs = str(getattr(torch.ops.dualcodec_ext, name).default._schema)
        assert ours.replace("_triton::", "::") == theirs, schema


@needs_triton
def test_import_loads_no_triton() -> None:
    code = "import sys, dualcodec_ext as dx; dx.build_info(); str(dx.doctor()); print('triton' in sys.modules)"
    assert run_python(code).stdout.strip() == "False"


@needs_triton
def test_it_works_without_the_compiled_module() -> None:
    code = """
import torch, dualcodec_ext as dx
x, w = torch.linspace(-1, 1, 24).reshape(1, 4, 6), torch.ones(4, 3)
with dx.backend("triton"):
    y = dx.ops.causal_dwconv1d(x, w)
print(dx.build_info()["backends"]["triton"] == "", torch.equal(y, dx.reference.causal_dwconv1d_ref(x, w)))
print("TRITON_INTERPRET is set" in str(dx.doctor()), dx.build_info()["module"])
"""
    done = run_python(code, DUALCODEC_EXT_DISABLE_MODULE="1")
    assert done.stdout.split() == ["True", "True", "True", "None"], done.stderr


@needs_triton
def test_what_triton_lacks_is_one_line() -> None:
    code = """
import torch, dualcodec_ext as dx
x, w = torch.ones(1, 4, 6), torch.ones(4, 4, 1)
model = dx.DualCodec(**__import__("dualcodec_ext.testing").testing.TINY).eval()
calls = [
    lambda: dx.ops.snake_conv1d(x, w),
    lambda: dx.ops.packing.pack_conv1d(w),
    lambda: dx.ops.residual_unit(x, x[0, :, 0], w, None, x[0, :, 0], w, None),
    lambda: dx.ops.causal_dwconv1d(x.double(), w[..., 0]),
    lambda: dx.ops.causal_dwconv1d(x.to("meta"), w[..., 0]),
    lambda: model.decode_from_codes(torch.zeros(1, 1, 3, dtype=torch.int64), None),
]
for call in calls:
    try:
        with dx.backend("triton"):
            call()
    except dx.BackendError as error:
        print(error)
"""
    lines = run_python(code).stdout.splitlines()
    ops = ", ".join(_choice.TRITON_OPS)
    assert lines == [
        f"backend 'triton' has no kernel for snake_conv1d, only for {ops}",
        f"backend 'triton' has no kernel for snake_conv1d, only for {ops}",
        f"backend 'triton' has no kernel for residual_unit, only for {ops}",
        "backend 'triton' has no kernels for torch.float64",
        "backend 'triton' needs tensors on cuda or cpu, got meta",
        f"backend 'triton' has no kernel for the inference program, only for {ops}",
    ]


@needs_triton
def test_a_packed_weight_belongs_to_its_family() -> None:
    code = """
import torch, dualcodec_ext as dx
x, alpha, w = torch.ones(1, 16, 6), torch.ones(16), torch.ones(16, 16, 4)
pack = lambda: dx.ops.packing.pack_upsample1d(w, 2, "transposed", (1, 1))
call = lambda packed: dx.ops.snake_upsample1d(x, alpha, w, stride=2, packed=packed)
packed = {}
for name in ("cpu", "triton"):
    with dx.backend(name):
        packed[name] = pack()
assert packed["cpu"].numel() == packed["triton"].numel()
for name, other in (("cpu", "triton"), ("triton", "cpu")):
    with dx.backend(name):
        call(packed[name])
        try:
            call(packed[other])
        except ValueError as error:
            print(error)
"""
    done = run_python(code)
    assert done.stdout.splitlines() == [
        "snake_upsample1d: packed must be a contiguous Float tensor of 1024 elements as made for this weight, "
        "got Float [32, 32]",
        "snake_upsample1d: packed must be a contiguous Float tensor of 1024 elements, [32, 32], as backend('triton') "
        "packs this weight, got Float [1024]",
    ], done.stderr


class TestAuto:
    """The table, with a GPU that is not there."""

    CUDA = torch.device("cuda")

    @pytest.fixture
    def can(self, monkeypatch: pytest.MonkeyPatch) -> set[str]:
        able: set[str] = {"cpu", "cuda", "triton"}
        monkeypatch.setattr(_common, "unavailable", lambda name: "" if name in able else "planted")
        monkeypatch.setattr(_common, "_told", set())
        return able

    def test_the_first_that_can_run_is_taken(self, can: set[str]) -> None:
        for op in _choice.TRITON_OPS:
            assert _common.choose_backend(self.CUDA, torch.bfloat16, op) == "cuda"
        can.remove("cuda")
        for op in _choice.TRITON_OPS:
            assert _common.choose_backend(self.CUDA, torch.bfloat16, op) == "triton"

    def test_the_reference_stands_behind_with_one_warning(
        self, can: set[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        can.remove("cuda")
        for _ in range(3):
            assert _common.choose_backend(self.CUDA, torch.float32, "snake_conv1d") == "reference"
            assert _common.choose_backend(self.CUDA, torch.float64, "rvq_search") == "reference"
        told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert told == [
            "snake_conv1d: the slow reference runs on cuda for torch.float32: backend 'cuda' can't run here: planted",
            "rvq_search: the slow reference runs on cuda for torch.float64: backend 'cuda' can't run here: planted; "
            "backend 'triton' has no kernels for torch.float64",
        ]

    def test_rows_may_hold_sizes(self, can: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
        rows = (_choice.Row("triton", max_steps=100), _choice.Row("cuda"))
        monkeypatch.setitem(_choice.AUTO, "rvq_search", rows)
        assert _choice.by_size("rvq_search") and not _choice.by_size("rvq_lookup")
        for steps, name in ((1, "triton"), (100, "triton"), (101, "cuda"), (None, "cuda")):
            assert _common.choose_backend(self.CUDA, torch.float32, "rvq_search", steps) == name

    def test_the_table_is_sound(self) -> None:
        assert set(_choice.AUTO) == {name for name in dx.ops.__all__ if name != "backend"} | {_choice.ENGINE}
        for op, rows in _choice.AUTO.items():
            assert any(not row.limited for row in rows), f"{op} must have a row without limits"
            assert all(row.backend != "triton" or op in _choice.TRITON_OPS for row in rows)
        first = [next(r.backend for r in _choice.AUTO[op] if not r.limited) for op in ("rvq_search", "rvq_lookup")]
        assert first[0] == first[1], "rvq_search and rvq_lookup share one packed tensor"
