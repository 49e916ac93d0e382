"""Builds dualcodec_ext._C: csrc/ through torch's cpp_extension, kernels/ once per instruction set through ninja.

DUALCODEC_EXT_CUDA=auto|0|1   CUDA sources: when a CUDA torch, nvcc and .cu files are found | never | or stop and say why
TORCH_CUDA_ARCH_LIST          what they are compiled for (default below)
"""

import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'"(.+)"', (ROOT / "dualcodec_ext/_version.py").read_text()).group(1)
DEFAULT_CUDA_ARCHS = "8.0;8.6;8.9;9.0a;10.0;12.0+PTX"
DEPENDENCIES = [
    "numpy>=1.26",
    "safetensors>=0.4.3",
    "soundfile>=0.12",
    "soxr>=0.4",
    "typer>=0.12",
    "tqdm>=4.66",
]
PACKAGES = {
    "dualcodec_ext": "dualcodec_ext",
    **{
        "dualcodec_ext." + str(p.relative_to(ROOT / "dualcodec_ext")).replace(os.sep, "."): str(
            p.relative_to(ROOT)
        )
        for p in sorted((ROOT / "dualcodec_ext").rglob("*"))
        if p.is_dir() and any(p.glob("*.py")) and "__pycache__" not in p.parts
    },
    "dualcodec_ext.kernels": "kernels",
    **{
        f"dualcodec_ext.kernels.{p.name}": f"kernels/{p.name}"
        for p in sorted((ROOT / "kernels").iterdir())
        if p.is_dir()
    },
}
NEEDS_TORCH = {"build_ext", "bdist_wheel", "install", "develop", "editable_wheel", "dist_info"}


def stop(message):
    sys.exit(f"dualcodec-ext: {message}")


def find_cuda(torch):
    """Return the CUDA toolkit's folder, or the reason why CUDA sources can't be built."""
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is a CPU build: install a CUDA torch"
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None, "nvcc was not found on PATH: install the CUDA toolkit"
    # nvcc may be a wrapper script elsewhere, so the toolkit is asked where it is.
    answer = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True)
    top = re.search(r"TOP=(\S+)", answer.stdout + answer.stderr)
    if top is None:
        return None, f"{nvcc} --dryrun did not tell where the toolkit is"
    return str(Path(top.group(1)).resolve()), ""


def cuda_sources(torch):
    wanted = os.environ.get("DUALCODEC_EXT_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        stop(f"DUALCODEC_EXT_CUDA must be auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return [], None
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "kernels").rglob("*.cu"))
    home, reason = find_cuda(torch)
    if wanted == "1":
        if home is None:
            stop(f"DUALCODEC_EXT_CUDA=1 can't be met: {reason}")
        if not sources:
            stop("DUALCODEC_EXT_CUDA=1 can't be met: this version has no CUDA sources")
    return (sources, home) if home is not None else ([], None)


def kernel_units(build_dir):
    """Return (source, object, flags) of every kernel unit on this machine's architecture."""
    listed = json.loads((ROOT / "kernels/sources.json").read_text())
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    define = [listed["x86_define"]] if x86 else []
    units = [(s, f"{build_dir}/once/{s}.o", define) for s in listed["once"]]
    sets = [name for name in listed["isa"] if x86 or name not in listed["x86_only"]]
    for name in sets:
        units += [(s, f"{build_dir}/{name}/{s}.o", define + listed["isa"][name]) for s in listed["per_isa"]]
    return units, sets, listed["flags"]


def build_kernels(build_dir):
    """Compile the kernels with ninja; returns the object files and the instruction sets."""
    build_dir.mkdir(parents=True, exist_ok=True)
    units, sets, common = kernel_units(build_dir)
    compiler = os.environ.get("CXX", "c++")
    escape = lambda path: str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")  # noqa: E731
    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        f"  command = {compiler} -MMD -MF $out.d {' '.join(common)} -fPIC $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = kernels: $out",
    ]
    for source, target, flags in units:
        lines += [
            f"build {escape(target)}: compile {escape(ROOT / 'kernels' / source)}",
            f"  flags = {' '.join(flags)}",
        ]
    (build_dir / "build.ninja").write_text("\n".join(lines) + "\n")
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    try:
        subprocess.run(["ninja", "-C", str(build_dir), *jobs], check=True)
    except FileNotFoundError:
        stop("building needs ninja: pip install ninja")
    except subprocess.CalledProcessError:
        stop("the kernels did not compile; the compiler's messages are above")
    return [target for _, target, _ in units], sets


def main():
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        if not NEEDS_TORCH.isdisjoint(sys.argv) or "egg_info" not in sys.argv:
            stop("building needs torch: pip install torch, then pip install --no-build-isolation .")
        torch = None

    options = {}
    version, torch_requirement = VERSION, "torch>=2.11"
    sdist = "sdist" in sys.argv
    if torch is not None and not sdist:
        minor = ".".join(torch.__version__.split("+")[0].split(".")[:2])
        local = "cpu" if torch.version.cuda is None else "cu" + torch.version.cuda.replace(".", "")
        version, torch_requirement = f"{VERSION}+torch{minor}.{local}", f"torch=={minor}.*"
        if tuple(int(part) for part in minor.split(".")) < (2, 11):
            stop(f"building needs torch 2.11 or newer, got {torch.__version__}")
        sources, cuda_home = cuda_sources(torch)
        if sources:
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHS)
            os.environ["CUDA_HOME"] = cpp_extension.CUDA_HOME = cuda_home

        class BuildExtension(cpp_extension.BuildExtension):
            def build_extensions(self):
                objects, sets = build_kernels(Path(self.build_temp).resolve() / "kernels")
                for extension in self.extensions:
                    extension.extra_objects = objects
                    extension.depends = [
                        *objects,
                        *map(str, ROOT.glob("csrc/*.h")),
                        *map(str, ROOT.glob("kernels/**/*.h")),
                    ]
                super().build_extensions()
                self.write_record(sets)

            def write_record(self, sets):
                compiler = subprocess.run(
                    [os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True
                ).stdout.splitlines()
                record = {
                    "version": version,
                    "torch": torch.__version__,
                    "python": f"{sys.version_info.major}.{sys.version_info.minor}",
                    "compiler": compiler[0] if compiler else "unknown",
                    "isa": sets,
                    "cuda": torch.version.cuda if sources else None,
                    "cuda_archs": os.environ["TORCH_CUDA_ARCH_LIST"].split(";") if sources else [],
                    "built": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                }
                module = Path(self.get_ext_fullpath("dualcodec_ext._C"))
                module.with_name("_build_record.json").write_text(json.dumps(record, indent=1) + "\n")

            def copy_extensions_to_source(self):
                super().copy_extensions_to_source()
                built = Path(self.build_lib) / "dualcodec_ext/_build_record.json"
                if built.exists():
                    shutil.copy2(built, ROOT / "dualcodec_ext/_build_record.json")

        csrc = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/*.cpp"))
        make = cpp_extension.CUDAExtension if sources else cpp_extension.CppExtension
        options = {
            "ext_modules": [
                make(
                    "dualcodec_ext._C",
                    csrc + sources,
                    extra_compile_args={
                        "cxx": ["-O2", "-std=c++20", "-fvisibility=hidden"],
                        "nvcc": ["-O3", "-std=c++20"],
                    },
                )
            ],
            "cmdclass": {"build_ext": BuildExtension},
        }

    setup(
        version=version,
        install_requires=[torch_requirement, *DEPENDENCIES],
        packages=list(PACKAGES),
        package_dir=PACKAGES,
        package_data={
            "dualcodec_ext": ["py.typed", "_build_record.json"],
            **{
                name: ["*.h", "*.cuh", "*.cpp", "*.cu", "*.json", "README.md"]
                for name in PACKAGES
                if "kernels" in name
            },
        },
        **options,
    )


main()
