"""What is built and installed: wheel, sdist, editable install, and a module that does not fit."""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import soundfile
import torch
from packaging.requirements import Requirement

from dualcodec_ext import build
from dualcodec_ext._cli.voice import vowels

ROOT = Path(__file__).resolve().parents[1]
MINOR = ".".join(torch.__version__.split(".")[:2])
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
# One line each, on stderr, with this before it.
WHO = "dualcodec-ext: "

# One environment variable more or less would change what these programs do.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("DUALCODEC", "PYTHON"))}


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def succeed(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = run(*command, cwd=cwd, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def make_environment(folder: Path, *path: str) -> Path:
    """A virtual environment without pip that sees the packages under `path`; returns its Python.

    The .pth files under `path` are not read, so an editable install there stays unseen.
    """
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "parent.pth").write_text("\n".join(path) + "\n")
    return folder / "bin/python"


def packages_folder(name: str) -> str:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    return str(Path(spec.origin).parents[1])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT)
    succeed(*command, cwd=ROOT)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment in which the wheel is installed; torch and the rest are those of this one."""
    return install(wheel, tmp_path_factory.mktemp("installed"))


def install(wheel: Path, folder: Path) -> Path:
    needed = ("torch", "numpy", "typer", "soundfile", "soxr")
    python = make_environment(folder / "venv", *sorted({packages_folder(name) for name in needed}))
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index")
    succeed(*pip, wheel, cwd=folder)
    return python


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has setuptools and no torch."""
    folder = tmp_path_factory.mktemp("without_torch")
    (folder / "packages").mkdir()
    for name in ("setuptools", "_distutils_hack", "packaging", "wheel"):
        if importlib.util.find_spec(name) is not None:
            home = Path(packages_folder(name))
            # With its record: setup()'s keywords are entry points, and are unknown without it.
            for part in [home / name, *home.glob(f"{name}-*.dist-info")]:
                (folder / "packages" / part.name).symlink_to(part)
    return make_environment(folder / "venv", str(folder / "packages"))


@pytest.fixture(scope="module")
def sdist(without_torch: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    hook = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    succeed(without_torch, "-c", hook, cwd=ROOT)
    return next(folder.glob("*.tar.gz"))


def written(*folders: str) -> set[str]:
    """Files of the repository under folders, but for what a build or a run leaves there."""
    files = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    skipped = re.compile(r"__pycache__|\.so$|_build_record\.json$|\.benchmarks|\.hypothesis")
    return {str(path.relative_to(ROOT)) for path in files if not skipped.search(str(path))}


def test_wheel_content(wheel: Path) -> None:
    assert re.fullmatch(rf"dualcodec_ext-[\d.]+\+torch{MINOR}\.(cpu|cu\d+)-cp3\d+-cp3\d+-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        info = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(info).decode()
        scripts = archive.read(info.replace("METADATA", "entry_points.txt")).decode()
        record = json.loads(archive.read("dualcodec_ext/_build_record.json"))
        licence = archive.read(info.replace("METADATA", "licenses/LICENSE")).decode()
    package = {name for name in written("dualcodec_ext") if name.endswith((".py", "py.typed"))}
    package |= written("dualcodec_ext/weights", "dualcodec_ext/recipes", "dualcodec_ext/_serving/static")
    kernels = {
        f"dualcodec_ext/{name}" for name in written("kernels") if name.endswith((".py", ".h", ".cuh", "README.md"))
    }
    assert names == package | kernels | {f"dualcodec_ext/_C{SUFFIX}", "dualcodec_ext/_build_record.json"}
    assert "dualcodec_ext/kernels/rvq_search/params.h" in names
    assert re.findall(r"Requires-Dist: torch(.*)", metadata) == [f"=={MINOR}.*"]
    core = re.findall(r"Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.MULTILINE)
    assert sorted(core) == ["numpy", "safetensors", "soundfile", "soxr", "torch", "tqdm", "typer"]
    assert {"bench", "hub", "plot", "semantic", "test"} <= set(re.findall(r"Provides-Extra: (\S+)", metadata))
    assert "dualcodec-ext = dualcodec_ext.cli:main" in scripts
    assert "Copyright" in licence and "The dualcodec_ext authors" in licence
    assert record["torch"] == torch.__version__ and record["compiler"] and "generic" in record["isa"]
    assert wheel.name.split("-")[1] == record["version"]


def test_wheel_runs_without_a_compiler(installed: Path, tmp_path: Path) -> None:
    program = """
import sys, dualcodec_ext as dx, dualcodec_ext.kernels
from importlib import resources
import torch
print(dx.__file__)
print(dx.build.load_module().__file__)
print(resources.files("dualcodec_ext.kernels").joinpath("common/isa.h").is_file())
with dx.backend("cpu"):
    y = dx.ops.causal_dwconv1d(torch.ones(1, 2, 5), torch.ones(2, 3))
print(y[0, 0].tolist(), torch.cuda.is_initialized())
print(dx.doctor())
"""
    lines = succeed(installed, "-c", program, cwd=tmp_path, PATH="").splitlines()
    site = str(installed.parents[1])
    assert lines[0].startswith(site) and lines[1].startswith(site) and lines[2] == "True"
    assert lines[3] == "[1.0, 2.0, 3.0, 3.0, 3.0] False"
    assert lines[-1] == "Nothing needs mending."


def requirements(of: importlib.metadata.PathDistribution) -> Iterator[str]:
    """The distributions that one needs where none of its extras is asked for."""
    for requirement in map(Requirement, of.requires or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement.name


def link_declared(wheel: Path, folder: Path) -> set[str]:
    """Link what a wheel declares, and what that declares, out of this environment into a folder; return the names."""
    with zipfile.ZipFile(wheel) as archive:
        info = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        waiting = list(requirements(importlib.metadata.PathDistribution(zipfile.Path(archive, info).parent)))
    found: set[str] = set()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        found.add(name)
        of = importlib.metadata.distribution(name)
        waiting += requirements(of)
        for top in {path.parts[0] for path in of.files or ()} - {"..", "__pycache__"}:
            with contextlib.suppress(FileExistsError):  # a folder that several share
                (folder / top).symlink_to(of.locate_file(top))
    return found


def test_speech_comes_back_with_what_is_declared_alone(wheel: Path, tmp_path: Path) -> None:
    """An environment of the wheel and its declared dependencies, and no network."""
    (tmp_path / "packages").mkdir()
    declared = link_declared(wheel, tmp_path / "packages")
    assert {"numpy", "torch", "typer", "jinja2"} <= declared and not {"pytest", "matplotlib", "scipy"} & declared
    python = make_environment(tmp_path / "venv", str(tmp_path / "packages"))
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index")
    succeed(*pip, wheel, cwd=tmp_path)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    # Where a process may leave the network it does; in any case Python's sockets are refused.
    refuse = "import socket\ndef refuse(*_):\n    raise AssertionError('the network was asked')\n"
    (site / "refuse_sockets.py").write_text(refuse + "socket.socket.connect = refuse\n")
    (site / "refuse_sockets.pth").write_text("import refuse_sockets\n")
    alone = ["unshare", "--net", "--map-root-user"]
    if shutil.which("unshare") is None or run(*alone, "true", cwd=tmp_path).returncode:
        alone = []
    program = "import importlib.util as u, socket; print(u.find_spec('pytest'), socket.socket.connect)"
    assert succeed(*alone, python, "-c", program, cwd=tmp_path).startswith("None <function refuse")
    soundfile.write(tmp_path / "in.wav", vowels("aeiou").samples[:24011], 24000)
    roundtrip = [python.with_name("dualcodec-ext"), "roundtrip", "in.wav", "out.wav", "--codes", "in.codes.safetensors"]
    assert "tiny" in succeed(*alone, *roundtrip, cwd=tmp_path)
    (before, _), (after, rate_hz) = (soundfile.read(tmp_path / name) for name in ("in.wav", "out.wav"))
    assert rate_hz == 24000 and after.shape == (24011,)
    assert 0.5 < (after**2).mean() / (before**2).mean() < 2
    assert (tmp_path / "in.codes.safetensors").stat().st_size > 0


@pytest.mark.parametrize("how", ["script", "module"])
def test_command_line_starts(installed: Path, tmp_path: Path, how: str) -> None:
    command = [installed.with_name("dualcodec-ext")] if how == "script" else [installed, "-m", "dualcodec_ext"]
    assert build.__version__ in succeed(*command, "--version", cwd=tmp_path)


def test_module_for_another_torch(installed: Path, tmp_path: Path) -> None:
    """In a process of its own, since there the module must never be touched."""
    record = next(installed.parents[1].glob("lib/python*/site-packages/dualcodec_ext")) / "_build_record.json"
    text = record.read_text()
    program = """
import sys, logging, torch
logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
import dualcodec_ext as dx
y = dx.ops.causal_dwconv1d(torch.ones(1, 2, 5), torch.ones(2, 3))
print(y[0, 0].tolist(), "dualcodec_ext._C" in sys.modules)
try:
    with dx.backend("cpu"):
        pass
except dx.BackendError as error:
    print(error)
print(dx.doctor())
"""
    record.write_text(text.replace(torch.__version__, "2.5.1"))
    try:
        output = succeed(installed, "-c", program, cwd=tmp_path)
    finally:
        record.write_text(text)
    assert "[1.0, 2.0, 3.0, 3.0, 3.0] False" in output
    assert len(re.findall("^WARNING.*was built for torch 2.5.1", output, re.MULTILINE)) == 1
    assert re.search("^backend 'cpu' can't run here: .*was built for torch 2.5.1", output, re.MULTILINE)
    assert f"PROBLEM: the compiled module was built for torch 2.5.1, and this is torch {torch.__version__}" in output
    assert "to mend it: rebuild it: pip install" in output


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package folder of one's own, with a module that fits but is no module."""
    monkeypatch.setattr(build, "_PACKAGE", tmp_path)
    monkeypatch.setattr(build, "_loaded", None)
    (tmp_path / f"_C{SUFFIX}").write_text("not a module")
    (tmp_path / "_build_record.json").write_text(json.dumps({"torch": torch.__version__, "cuda": None}))
    yield tmp_path


def change_record(folder: Path, **values: str) -> None:
    path = folder / "_build_record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


UNUSABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no module": (lambda f: (f / f"_C{SUFFIX}").unlink(), "the compiled module was not built"),
    "another Python": (
        lambda f: (f / f"_C{SUFFIX}").rename(f / "_C.cpython-399-x86_64-linux-gnu.so"),
        r"the compiled module \(_C.cpython-399-x86_64-linux-gnu.so\) is not for this Python \(.*\)",
    ),
    "no record": (lambda f: (f / "_build_record.json").unlink(), "the record .* is missing or damaged"),
    "damaged record": (lambda f: (f / "_build_record.json").write_text("{"), "the record .* is missing or damaged"),
    "another torch": (lambda f: change_record(f, torch="2.130.0"), "was built for torch 2.130.0, and this is torch 2"),
    "no version": (lambda f: change_record(f, torch="?"), r"was built for torch \?, and this is torch 2"),
    "another CUDA": (lambda f: change_record(f, cuda="99.1"), "was built for CUDA 99.1, and this torch has"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_module(folder: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} was loaded")

    monkeypatch.setattr(build.importlib, "import_module", refuse)
    change, message = UNUSABLE[case]
    change(folder)
    assert build.load_module() is None
    assert re.search(message, build.unavailable_reason()) and "\n" not in build.unavailable_reason()
    report = build.doctor()
    assert not report.healthy and re.search(message, report.problems[0].what) and report.problems[0].mend in str(report)
    info = build.build_info()
    assert (info["module"], info["active_isa"], info["cpu"]) == (None, None, {})
    assert info["backends"]["cpu"] == build.unavailable_reason() and info["backends"]["reference"] == ""
    json.dumps(info)


def test_broken_module(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError("undefined symbol:\n _ZN3c10")

    monkeypatch.setattr(build.importlib, "import_module", fail)
    assert build.load_module() is None
    assert "can't be loaded (undefined symbol: _ZN3c10): rebuild it" in build.unavailable_reason()


@pytest.mark.skipif(sys.platform != "linux", reason="needs an ELF module")
@pytest.mark.parametrize("kept", [0.999, 0.1])
def test_module_cut_short_is_not_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch, kept: float) -> None:
    """A disk that filled up leaves one, and loading it ends the process with SIGBUS."""
    whole = (ROOT / f"dualcodec_ext/_C{SUFFIX}").read_bytes()
    (folder / f"_C{SUFFIX}").write_bytes(whole)
    assert build._misfit() is None
    (folder / f"_C{SUFFIX}").write_bytes(whole[: int(kept * len(whole))])
    monkeypatch.setattr(build.importlib, "import_module", lambda name: pytest.fail("it was loaded"))
    assert build.load_module() is None and "is cut short: rebuild it" in build.unavailable_reason()


def test_module_can_be_disabled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUALCODEC_EXT_DISABLE_MODULE", "1")
    assert build.load_module() is None and "DUALCODEC_EXT_DISABLE_MODULE" in build.unavailable_reason()


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [
        ("8.0", "8.6", True),
        ("8.6", "8.0", False),
        ("8.0", "9.0", False),
        ("8.0+PTX", "12.0", True),
        ("9.0a", "9.0", True),
        ("9.0a", "10.0", False),
        ("12.0+PTX", "9.0", False),
        ("?", "9.0", False),
    ],
)
def test_which_gpus_code_runs_on(arch: str, capability: str, runs: bool) -> None:
    assert build._arch_runs(arch, capability) is runs


def test_sdist_content(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        top = sdist.name.removesuffix(".tar.gz")
        names = {member.name.removeprefix(f"{top}/") for member in archive if member.isfile()}
        told = archive.extractfile(f"{top}/PKG-INFO")
        assert told is not None
        metadata = told.read().decode()
    assert written("csrc", "kernels", "dualcodec_ext", "tests") <= names
    assert {"setup.py", "pyproject.toml", "CMakeLists.txt", "Makefile", "README.md", "LICENSE", "CHANGELOG.md"} <= names
    assert not [name for name in names if re.search(r"\.(so|o|pyc|wav)$|_build_record|^build/|\.venv", name)]
    assert re.search(r"^Version: [\d.]+$", metadata, re.MULTILINE)
    assert "Requires-Dist: torch>=2.11\n" in metadata


@pytest.mark.parametrize("command", ["dist_info", "bdist_wheel", "build_ext"])
def test_building_without_torch_says_so(without_torch: Path, sdist: Path, tmp_path: Path, command: str) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    done = run(without_torch, "setup.py", command, cwd=tmp_path / sdist.name.removesuffix(".tar.gz"))
    needs = "building needs torch: pip install torch, then pip install --no-build-isolation .\n"
    assert (done.returncode, done.stderr) == (1, WHO + needs)


@pytest.mark.skipif("DUALCODEC_EXT_SLOW" not in os.environ, reason="compiles everything: set DUALCODEC_EXT_SLOW=1")
def test_sdist_builds(sdist: Path, tmp_path: Path) -> None:
    """The whole way that a user goes: sdist, compile, install, import."""
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path)
    succeed(*pip, sdist, cwd=tmp_path)
    python = install(next(tmp_path.glob("*.whl")), tmp_path)
    program = "import dualcodec_ext as dx; print(dx.doctor().healthy)"
    assert succeed(python, "-c", program, cwd=tmp_path) == "True\n"


def test_editable_install(tmp_path: Path) -> None:
    hook = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    succeed(sys.executable, "-c", hook, cwd=ROOT)
    python = install(next(tmp_path.glob("*.whl")), tmp_path)
    program = """
import dualcodec_ext as dx, dualcodec_ext.kernels, dualcodec_ext.kernels.common
print(dx.__file__, *dx.kernels.__path__, *dx.kernels.common.__path__, dx.build.load_module().__file__, sep="\\n")
"""
    package = ROOT / "dualcodec_ext"
    expected = [package / "__init__.py", ROOT / "kernels", ROOT / "kernels/common", package / f"_C{SUFFIX}"]
    assert succeed(python, "-c", program, cwd=tmp_path).splitlines() == [str(path) for path in expected]


def test_objects_keep_to_their_instruction_set(wheel: Path) -> None:
    """A weak symbol outside the set's own namespace could replace the one that every machine runs."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    objects = list(ROOT.glob(f"build/*{sys.implementation.cache_tag}-torch{MINOR}-*/kernels/*/*/*_cpu.cpp.o"))
    sets = ("generic", "avx2", "avx512", "avx512_bf16", "amx_bf16")
    objects = [path for path in objects if path.parents[1].name in sets]
    assert len(objects) >= 7
    for path in objects:
        symbols = subprocess.run(["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True)
        shared = re.findall(r"^\w* [A-Zuvw] (.*)", symbols.stdout, re.MULTILINE)
        own = f"dcx::{path.parents[1].name}::"
        assert shared and [name for name in shared if own not in name] == [], path


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU torch")
def test_cuda_that_cannot_be_met(tmp_path: Path) -> None:
    done = run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=ROOT, DUALCODEC_EXT_CUDA="1")
    why = f"DUALCODEC_EXT_CUDA=1 can't be met: torch {torch.__version__} is a CPU build: install a CUDA torch\n"
    assert (done.returncode, done.stderr) == (1, WHO + why)
