"""setup.py's own decisions: whether CUDA code is built and for what, and which C++ runtime the module loads."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
WHO = "dualcodec-ext: "  # before the one line with which a build stops


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dualcodec_ext_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(sys.platform != "linux", reason="of libstdc++")
@pytest.mark.parametrize("known", [True, False], ids=["the compiler's", "torch's"])
def test_modules_share_the_cxx_runtime(setup_py: ModuleType, tmp_path: Path, known: bool) -> None:
    """With a compiler that links an archive of it: a module with locales of its own can't write an error's numbers."""
    source, module = tmp_path / "a.cpp", tmp_path / "a.so"
    source.write_text('#include <iostream>\nvoid f(long n) { std::cout << "got " << n; }\n')
    compiler = os.environ.get("CXX", "c++")
    link = [*compiler.split(), "-shared", "-fPIC", "-static-libstdc++", source, "-o", module]
    if subprocess.run(link, capture_output=True).returncode:
        pytest.skip(f"{compiler} has no archive of libstdc++")
    with pytest.raises(SystemExit, match="the module must load torch's libstdc"):
        setup_py.check_cxx_runtime(module)
    assert not module.exists()
    shared = setup_py.cxx_runtime(compiler if known else "false")
    assert len(shared) == 1
    subprocess.run([*link, *shared], check=True)
    setup_py.check_cxx_runtime(module)
    # Nothing of the archive is left inside: it alone defines what a module never exports.
    assert b"_txnal_" not in module.read_bytes()


NVCC = """#!/bin/sh
case "$1" in
  --dryrun) echo '#$ _HERE_=/x' >&2; echo '#$ TOP={home}/bin/..' >&2 ;;
  --version) echo 'Cuda compilation tools, release 13.0, V13.0.88' ;;
  --list-gpu-arch) echo compute_80; echo compute_90; echo compute_120 ;;
esac
"""


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CUDA toolkit that only talks, and on PATH a wrapper of its nvcc somewhere else."""
    home = tmp_path / "cuda-13.0"
    for folder in (home / "bin", tmp_path / "wrappers"):
        folder.mkdir(parents=True)
        (folder / "nvcc").write_text(NVCC.format(home=home))
        (folder / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "wrappers"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    return home


def test_cuda_plan(setup_py: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_torch = setup_py.Torch("2.13.0+cu130", "13.0")
    sources = ["kernels/rvq_search/rvq_search.cu"]
    plan = setup_py.plan_cuda(cuda_torch, sources, {})
    assert plan == (sources, str(toolkit), "8.0;9.0a;12.0+PTX")
    assert setup_py.plan_cuda(cuda_torch, sources, {"DUALCODEC_EXT_CUDA": "1"}) == plan
    assert setup_py.plan_cuda(cuda_torch, sources, {"TORCH_CUDA_ARCH_LIST": "9.0a"}).archs == "9.0a"
    assert setup_py.plan_cuda(cuda_torch, sources, {"DUALCODEC_EXT_CUDA": "0"}) == "DUALCODEC_EXT_CUDA=0"
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.setenv("PATH", "")
    assert setup_py.plan_cuda(cuda_torch, sources, {}) == plan


@pytest.mark.parametrize("wanted", ["auto", "1"])
@pytest.mark.parametrize(
    ("torch_is", "sources", "path", "why"),
    [
        (("2.13.0+cpu", None), ["a.cu"], None, "torch 2.13.0+cpu is a CPU build: install a CUDA torch"),
        (("2.13.0+cu130", "13.0"), ["a.cu"], "", "nvcc was not found: install the CUDA toolkit"),
        (("2.11.0+cu126", "12.6"), ["a.cu"], None, "nvcc is of CUDA 13.0, torch 2.11.0+cu126 of CUDA 12.6"),
        (("2.13.0+cu130", "13.0"), [], None, "this version has no CUDA sources"),
    ],
    ids=["CPU torch", "no nvcc", "another CUDA", "no sources"],
)
def test_cuda_plan_that_fails(
    setup_py: ModuleType,
    toolkit: Path,
    monkeypatch: pytest.MonkeyPatch,
    torch_is: tuple[str, str | None],
    sources: list[str],
    path: str | None,
    why: str,
    wanted: str,
) -> None:
    if path is not None:
        monkeypatch.setenv("PATH", path)
    if wanted == "auto":
        assert setup_py.plan_cuda(setup_py.Torch(*torch_is), sources, {}) == why
        return
    with pytest.raises(SystemExit, match=re.escape(f"{WHO}DUALCODEC_EXT_CUDA=1 can't be met: {why}")):
        setup_py.plan_cuda(setup_py.Torch(*torch_is), sources, {"DUALCODEC_EXT_CUDA": "1"})


def test_cuda_switch_is_checked(setup_py: ModuleType) -> None:
    with pytest.raises(SystemExit, match="DUALCODEC_EXT_CUDA must be auto, 0 or 1, got 'yes'"):
        setup_py.plan_cuda(setup_py.Torch("2.13.0", None), [], {"DUALCODEC_EXT_CUDA": "yes"})
