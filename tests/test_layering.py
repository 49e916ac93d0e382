"""The layers of CONTRIBUTING.md, read off the sources: who may import whom, and what no file may hold."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "dualcodec_ext"
# Bottom to top; a module imports from its own layer and from those below.
LAYERS = (
    ("_version", "errors", "kernels"),
    ("reference",),
    (
        "_code_look",
        "_compare",
        "_files",
        "_signals",
        "_snapshot",
        "audio",
        "_w2v_bert",
        "_w2v_fbank",
        "_w2v_layers",
        "build",
        "code_use",
        "codes",
        "config",
        "hub",
        "peer",
        "semantic",
        "speech_data",
        "testing",
        "windows",
    ),
    ("_pool", "ops"),
    ("forms", "steps"),
    ("stages",),
    ("pipeline",),
    ("tiles",),
    ("pieces",),
    ("_stream_cpu", "_stream_plan"),
    ("_stream_passes", "_stream_rows"),
    ("engine",),
    ("graphs",),
    ("model",),
    ("accelerate",),
    (
        "_stream_encoder",
        "_stream_graph",
        "_stream_slots",
        "inference",
        "streaming",
        "_training",
        "training",
    ),
    ("_serving", "serving"),
    ("__init__",),
    ("__main__", "_cli", "cli", "demo", "verify"),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# C headers alone: an inline function of the standard library that the linker merges across instruction sets could
# carry instructions that the machine lacks.
KERNEL_HEADERS = {"arm_neon.h", "immintrin.h", "math.h", "stddef.h", "stdint.h", "string.h"}
SOURCE_SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh", ".toml", ".txt", ".json", ".in", ".md", ""}
LONGEST_FILE = 450


def imports(path: Path, module: str) -> Iterator[str]:
    """The dotted names that a file imports, at the top or inside functions."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def python_files(folder: str) -> dict[str, Path]:
    """Every module of a folder of the repository, by its dotted name."""
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def layer_name(module: str) -> str:
    """What LAYERS calls `dualcodec_ext.a.b`: a. What the package itself offers is `__init__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in RANK else "__init__"


def breaches(module: str, path: Path) -> list[str]:
    """The imports that go up."""
    own = RANK[layer_name(module)]
    wanted = [name for name in imports(path, module) if name.split(".")[0] == PACKAGE]
    return [f"{module} imports {name}" for name in wanted if RANK[layer_name(name)] > own]


def sources() -> list[Path]:
    """Every file that a person wrote."""
    folders = ("csrc", "kernels", PACKAGE, "tests", "bench", ".ci")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if "__pycache__" not in p.parts]
    top = [p for p in ROOT.iterdir() if not p.name.startswith(".")]
    return [p for p in files + top if p.is_file() and p.suffix in SOURCE_SUFFIXES and ".benchmarks" not in p.parts]


def test_every_module_has_a_layer() -> None:
    names = {name.split(".")[1] for name in python_files(PACKAGE) if "." in name}
    assert names <= RANK.keys(), f"add to LAYERS: {names - RANK.keys()}"


def test_imports_go_down() -> None:
    found = [line for module, path in python_files(PACKAGE).items() for line in breaches(module, path)]
    assert not found, "\n".join(found)


def test_reference_imports_torch_only() -> None:
    for module, path in python_files(f"{PACKAGE}/reference").items():
        for name in imports(path, module):
            top = name.split(".")[0]
            fine = top == "torch" or top in sys.stdlib_module_names or name.startswith(f"{PACKAGE}.reference.")
            assert fine, f"{module} imports {name}"


def test_nothing_imports_bench_or_tests() -> None:
    inside = {**python_files(PACKAGE), **python_files("kernels")}
    for module, path in {**inside, **python_files("bench")}.items():
        banned = {"tests"} if module.startswith("bench") else {"bench", "tests"}
        assert not banned & {name.split(".")[0] for name in imports(path, module)}, module


def test_a_planted_breach_is_found(tmp_path: Path) -> None:
    bad = tmp_path / "ops.py"
    bad.write_text(
        "def f():\n    from . import engine\n    from .engine import Engine\n    import dualcodec_ext.model\n"
    )
    assert len(breaches(f"{PACKAGE}.ops", bad)) == 3
    assert breaches(f"{PACKAGE}.model", bad) == []


def includes(path: Path) -> list[tuple[str, str]]:
    return re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)', path.read_text(encoding="utf-8"), re.MULTILINE)


def test_kernels_include_only_what_they_may() -> None:
    per_isa = {ROOT / "kernels" / name for name in json.loads((ROOT / "kernels/sources.json").read_text())["per_isa"]}
    for path in sorted((ROOT / "kernels").rglob("*")):
        if path.suffix not in (".h", ".cpp", ".cu", ".cuh"):
            continue
        for kind, name in includes(path):
            assert not re.match(r"torch/|ATen/|c10/|pybind11/|Python\.h", name), f"{path} includes {name}"
            if kind == '"':
                assert (path.parent / name).resolve().is_relative_to(ROOT / "kernels"), f"{path} includes {name}"
            elif path.suffix == ".h" or path in per_isa:
                assert name in KERNEL_HEADERS, f"{path} includes {name}"


def test_triton_kernels_import_triton_and_each_other() -> None:
    found = [(module, name) for module, path in python_files("kernels").items() for name in imports(path, module)]
    assert [module for module, _ in found if module.endswith("_triton")]
    assert not [pair for pair in found if pair[1].split(".")[0] not in ("kernels", "triton")]


def test_every_kernel_source_is_listed() -> None:
    listed = json.loads((ROOT / "kernels/sources.json").read_text())
    there = {str(path.relative_to(ROOT / "kernels")) for path in (ROOT / "kernels").rglob("*.cpp")}
    assert there == {*listed["per_isa"], *listed["once"]}


@pytest.mark.parametrize(
    "banned",
    [
        r"-Ofas[t]|-f(fast|unsafe|associative|reciprocal|finite)[a-z-]*-mat[h]|use_fast_mat[h]",
        r"march=nativ[e]",
        r"\b(TOD[O]|FIXM[E])\b",
    ],
    ids=["flags that change results", "a build for one machine", "unfinished work"],
)
def test_no_source_holds(banned: str) -> None:
    code = [path for path in sources() if path.suffix != ".md"]  # documents may say what is not done
    assert [str(path) for path in code if re.search(banned, path.read_text(encoding="utf-8"))] == []
    planted = "-ffast-mat" + "h march=nativ" + "e FIXM" + "E"
    assert re.search(banned, planted)


def test_files_are_short() -> None:
    code = [path for path in sources() if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")]
    assert len(code) > 50
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in code}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def test_import_brings_torch_alone(tmp_path: Path) -> None:
    program = """
import sys, torch
before = set(sys.modules)
import dualcodec_ext
new = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(sorted(new), torch.cuda.is_initialized())
"""
    # Without PATH no compiler could be found.
    environment = {"PATH": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "['dualcodec_ext'] False"
