"""Builds dualcodec_ext._C: csrc/ through torch's cpp_extension, kernels/ once per instruction set with ninja.

DUALCODEC_EXT_CUDA    CUDA code: auto (where a CUDA torch, nvcc and .cu files are), 0, 1 (or stop and say why)
TORCH_CUDA_ARCH_LIST  what it is compiled for; default: DEFAULT_CUDA_ARCHS, as far as nvcc knows them
MAX_JOBS, CXX         compile jobs at a time; the C++ compiler

Objects stay in build/, so a second build compiles what changed. Only building needs torch.
"""

import contextlib
import fcntl
import importlib.util
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'"(.+)"', (ROOT / "dualcodec_ext/_version.py").read_text())[1]
OLDEST_TORCH = (2, 11)
DEFAULT_CUDA_ARCHS = "8.0;8.6;8.9;9.0a;10.0;12.0+PTX"
CXX_RUNTIME = "libstdc++.so.6"
CXX_STANDARD = "-std=c++20"
DEPENDENCIES = [
    "numpy>=1.26",
    "safetensors>=0.4.3",
    "soundfile>=0.12",
    "soxr>=0.4",
    "typer>=0.12",
    "tqdm>=4.66",
]
NEEDS_TORCH = {"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop", "dist_info"}
COMPILES = NEEDS_TORCH - {"dist_info"}


class Torch(NamedTuple):
    version: str
    cuda: str | None

    @property
    def minor(self):
        return tuple(int(part) for part in re.match(r"(\d+)\.(\d+)", self.version).groups())


class Cuda(NamedTuple):
    """How CUDA sources are built."""

    sources: list[str]
    home: str
    archs: str


def stop(message):
    sys.exit(f"dualcodec-ext: {message}")


def find_torch():
    """Return what torch says of itself, without the seconds that importing it takes; None without torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    facts = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    return Torch(str(facts["__version__"]), facts.get("cuda"))


def find_nvcc():
    """Return (toolkit folder, nvcc's version), or the reason why there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which(str(Path(home, "bin/nvcc"))) if home else shutil.which("nvcc")
    if nvcc is None:
        return f"{home}/bin holds no nvcc: set CUDA_HOME" if home else "nvcc was not found: install the CUDA toolkit"
    if not home:
        # nvcc on PATH may be a wrapper script that lies elsewhere, so the toolkit is asked where it is.
        answer = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        top = re.search(r"\bTOP=(\S+)", answer.stdout + answer.stderr)
        if top is None:
            return f"{nvcc} --dryrun did not tell where the toolkit is: set CUDA_HOME"
        home = str(Path(top[1]).resolve())
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release (\d+\.\d+)", told)
    return (home, version[1]) if version else f"{nvcc} --version tells no release"


def known_archs(home):
    """Return DEFAULT_CUDA_ARCHS without those that this nvcc lacks."""
    listed = subprocess.run([f"{home}/bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout
    number = {arch: re.sub(r"\D", "", arch.partition("+")[0]) for arch in DEFAULT_CUDA_ARCHS.split(";")}
    return ";".join(arch for arch in number if f"compute_{number[arch]}" in listed.split())


def plan_cuda(torch, sources, environ):
    """Return how CUDA code is built, or the reason why it is not; stops where the user's 1 can't be met."""
    wanted = environ.get("DUALCODEC_EXT_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        stop(f"DUALCODEC_EXT_CUDA must be auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return "DUALCODEC_EXT_CUDA=0"
    plan = _plan_cuda(torch, sources, environ)
    if wanted == "1" and isinstance(plan, str):
        stop(f"DUALCODEC_EXT_CUDA=1 can't be met: {plan}")
    return plan


def _plan_cuda(torch, sources, environ):
    if torch.cuda is None:
        return f"torch {torch.version} is a CPU build: install a CUDA torch"
    found = find_nvcc()
    if isinstance(found, str):
        return found
    home, version = found
    if version.split(".")[0] != torch.cuda.split(".")[0]:
        return f"nvcc is of CUDA {version}, torch {torch.version} of CUDA {torch.cuda}"
    if not sources:
        return "this version has no CUDA sources"
    return Cuda(sources, home, environ.get("TORCH_CUDA_ARCH_LIST") or known_archs(home))


def kernel_units(build_dir):
    """Return (source, object, flags) of every kernel unit for this machine's architecture, and its sets."""
    listed = json.loads((ROOT / "kernels/sources.json").read_text())
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    flags = [*listed["flags"], "-fPIC", *([listed["x86_define"]] if x86 else [])]
    sets = [name for name in listed["isa"] if x86 or name not in listed["x86_only"]]
    units = [(source, f"{build_dir}/once/{source}.o", flags) for source in listed["once"]]
    for name in sets:
        own = [*flags, *listed["isa"][name]]
        units += [(source, f"{build_dir}/{name}/{source}.o", own) for source in listed["per_isa"]]
    return units, sets


def build_kernels(build_dir, compiler):
    """Compile the kernels with ninja; returns the object files and the instruction sets."""
    build_dir.mkdir(parents=True, exist_ok=True)
    units, sets = kernel_units(build_dir)

    def escape(path):
        return re.sub(r"([$ :])", r"$\1", str(path))

    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        f"  command = {compiler} -MMD -MF $out.d $flags -c $in -o $out",
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
    if subprocess.run(["ninja", "-C", str(build_dir), *jobs]).returncode != 0:
        stop("the kernels did not compile; the compiler's messages are above")
    return [target for _, target, _ in units], sets


def first_line(*command):
    """Return the first line that a command prints, or None where it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def check_tools():
    """Stop in one line where a tool is missing; returns the compiler."""
    with contextlib.suppress(ImportError):
        import ninja

        # The pip package's program is on PATH only in an activated environment.
        os.environ["PATH"] = ninja.BIN_DIR + os.pathsep + os.environ.get("PATH", "")
    if shutil.which("ninja") is None:
        stop("building needs ninja: pip install ninja")
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        stop(f"building needs a C++ compiler, and {compiler} was not found: install g++ or clang++, or set CXX")
    return compiler


def make_build_ext(version, cuda, compiler):
    """Return setuptools' build_ext command: torch's, with our kernels' objects and the build record added."""
    import torch
    from torch.utils import cpp_extension

    class BuildExt(cpp_extension.BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            # setuptools gives editable builds a temporary folder: each of them would compile everything anew.
            minor = ".".join(torch.__version__.split(".")[:2])
            name = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}-torch{minor}-{cuda_tag(cuda)}"
            self.build_temp = str(ROOT / "build" / name)

        def run(self):
            Path(self.build_temp).mkdir(parents=True, exist_ok=True)
            with open(Path(self.build_temp, ".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                super().run()
                self.write_record()

        def build_extensions(self):
            objects, self.instruction_sets = build_kernels(Path(self.build_temp, "kernels"), compiler)
            for extension in self.extensions:
                extension.extra_objects = objects
            super().build_extensions()

        def write_record(self):
            """Leave the text that dualcodec_ext/build.py reads before it loads the module."""
            record = {
                "version": version,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "platform": sysconfig.get_platform(),
                "compiler": first_line(*compiler.split(), "--version"),
                "isa": self.instruction_sets,
                "cuda": torch.version.cuda if cuda else None,
                "cuda_archs": re.split(r"[; ]+", cuda.archs) if cuda else [],
                "commit": first_line("git", "rev-parse", "--short", "HEAD") if (ROOT / ".git").exists() else None,
            }
            module = Path(self.get_ext_fullpath("dualcodec_ext._C"))
            if sys.platform == "linux":
                check_cxx_runtime(module)
            module.with_name("_build_record.json").write_text(json.dumps(record, indent=1) + "\n")

    return BuildExt


class BuildPy(build_py):
    """Starts from an empty folder, or a file that was removed from the sources would live on in wheels."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "dualcodec_ext"), ignore_errors=True)
        super().run()


def cuda_tag(cuda):
    return "cu" + find_torch().cuda.replace(".", "") if cuda else "cpu"


def openmp_link(torch_lib):
    """Return how to link OpenMP so that at::parallel_for shares torch's threads: its libgomp, where it brings one."""
    bundled = sorted(path.name for path in torch_lib.glob("libgomp*.so*"))
    return [f"-L{torch_lib}", f"-l:{bundled[0]}"] if bundled else ["-fopenmp"]


def cxx_runtime(compiler):
    """Return how to link the shared libstdc++ even where the compiler is set up to link its archive.

    torch throws its errors and writes their text with the shared library. A module with a copy of its own has two
    sets of locales: an op's error lost its numbers, or ended the process. What comes first on the line is taken.
    """
    if sys.platform != "linux":
        return []
    found = first_line(*compiler.split(), f"-print-file-name={CXX_RUNTIME}") or ""
    if not os.path.isabs(found):  # the compiler does not know it: torch has loaded it
        mapped = re.search(rf"/.*/{re.escape(CXX_RUNTIME)}.*", Path("/proc/self/maps").read_text())
        found = mapped[0] if mapped else ""
    return [found] if found else []


def check_cxx_runtime(module):
    """Stop where a module does not load the shared libstdc++, and leave none behind."""
    if CXX_RUNTIME.encode() not in module.read_bytes():
        module.unlink()
        stop(f"the module must load torch's {CXX_RUNTIME}, and the compiler did not link it: set CXX to another one")


def compiled_options(torch, version, cuda):
    """Return setup()'s arguments for a build that compiles."""
    compiler = check_tools()
    defines = []
    if cuda:
        os.environ["TORCH_CUDA_ARCH_LIST"], os.environ["CUDA_HOME"] = cuda.archs, cuda.home
        defines = ["-DDCX_WITH_CUDA", *(["-DDCX_WITH_SM90A"] if "9.0a" in cuda.archs else [])]
    build_ext = make_build_ext(version, cuda, compiler)
    from torch.utils import cpp_extension

    extension = (cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension)(
        "dualcodec_ext._C",
        sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.cpp")) + (cuda.sources if cuda else []),
        extra_compile_args={
            # C++20 as for the kernels; torch 2.11 would add C++17. at::parallel_for is a header: without -fopenmp it
            # compiles to a loop on one thread.
            "cxx": [CXX_STANDARD, "-O2", "-g0", "-fvisibility=hidden", "-fopenmp", *defines],
            "nvcc": [CXX_STANDARD, "-O3", "--generate-line-info", *defines],
        },
        extra_link_args=[*cxx_runtime(compiler), *openmp_link(Path(cpp_extension.TORCH_LIB_PATH))],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": build_ext, "build_py": BuildPy}}


def main():
    commands = set(sys.argv[1:])
    version, torch_needed, options = VERSION, f"torch>={OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}", {}
    torch = find_torch()
    if commands & NEEDS_TORCH:
        if torch is None:
            stop("building needs torch: pip install torch, then pip install --no-build-isolation .")
        if torch.minor < OLDEST_TORCH:
            stop(f"building needs torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer, got {torch.version}")
    # An sdist fits every torch, a wheel the one that it was built with.
    if torch is not None and "sdist" not in commands:
        sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("kernels/**/*.cu"))
        plan = plan_cuda(torch, sources, os.environ)
        cuda = plan if isinstance(plan, Cuda) else None
        minor = ".".join(map(str, torch.minor))
        version, torch_needed = f"{VERSION}+torch{minor}.{cuda_tag(cuda)}", f"torch=={minor}.*"
        if commands & COMPILES:
            print(f"dualcodec-ext: CUDA code: {f'for {cuda.archs}' if cuda else f'none ({plan})'}")
            options = compiled_options(torch, version, cuda)

    folders = [path for path in sorted(ROOT.glob("kernels/*")) if path.is_dir() and path.name != "__pycache__"]
    kernels = {"dualcodec_ext.kernels": "kernels"}
    kernels |= {f"dualcodec_ext.kernels.{folder.name}": f"kernels/{folder.name}" for folder in folders}
    setup(
        version=version,
        install_requires=[torch_needed, *DEPENDENCIES],
        packages=[*find_packages(include=["dualcodec_ext", "dualcodec_ext.*"]), *kernels],
        package_dir=kernels,
        package_data={
            "dualcodec_ext": ["py.typed", "recipes/*.json", "weights/*", "_serving/static/*"],
            **{name: ["*.h", "*.cuh", "README.md"] for name in kernels},
        },
        include_package_data=False,
        **options,
    )


if __name__ == "__main__":
    main()
