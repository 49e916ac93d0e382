"""`make gpu-check`: build, test, sanitize and measure on a machine with a GPU, within nine minutes.

Needs torch, nvcc, ninja and pytest in the Python that runs it, and installs nothing. Every part has a limit; what a
part leaves of its time goes to the next, and a part that fails stops none. The part `tuned`, peers that take minutes to
compile, runs where it is asked for. Each op is tested and sanitized in processes
of its own, since an illegal access ends all CUDA calls of a process, and tests go on behind one that ended its process.
Logs and summary.json are written as they come.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "gpu-check"
PARTS: dict[str, float] = {"build": 150.0, "test": 150.0, "sanitize": 100.0, "bench": 130.0}  # seconds, of 530
ASKED_FOR: dict[str, float] = {"tuned": 530.0}  # by name alone: peers that are compiled for minutes, beside ours
TOOLS: dict[str, tuple[str, ...]] = {
    "memcheck": (),
    "racecheck": ("--racecheck-report", "all"),
    "initcheck": (),
    "synccheck": (),
}
OPS = ("causal_dwconv1d", "residual_unit", "rvq_lookup", "rvq_search", "snake_conv1d", "snake_upsample1d")
# In turn: of what time is left the share of each, and seconds of a run. Some time is kept for what comes behind.
BENCH_GROUPS: dict[str, dict[str, tuple[float, float]]] = {
    "bench": {"goals": (1.0, 45.0), "rest": (1.0, 30.0)},
    "tuned": {"tuned-b1": (0.6, 600.0), "tuned-b32": (1.0, 600.0)},
}
_GPU = """
import torch
assert torch.cuda.is_available(), "torch finds no GPU"
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else ""))
"""


@dataclass
class Step:
    """What became of one command."""

    part: str
    name: str
    status: str  # ok, failed, out of time, skipped
    seconds: float
    note: str = ""
    code: int | None = None

    def line(self) -> str:
        return f"{self.part:<9} {self.name:<26} {self.status:<12} {self.seconds:6.1f} s  {self.note}".rstrip()


Command = tuple[Sequence[str], Mapping[str, str]]  # words, and what is added to the environment


@dataclass
class _Running:
    name: str
    log: Path
    process: subprocess.Popen[bytes]
    begun: float


class Check:
    """The steps so far, and what they share."""

    def __init__(
        self, results: Path, seconds: float, parts: Sequence[str], logs: Path = WORK, work: Path = WORK
    ) -> None:
        self.results, self.logs, self.work, self.steps = results.resolve(), logs.resolve(), work, list[Step]()
        sizes = PARTS | ASKED_FOR
        share = seconds / sum(sizes[part] for part in parts)
        start = time.monotonic()
        self.ends: dict[str, float] = {}
        for part in parts:
            start += sizes[part] * share
            self.ends[part] = start
        for folder in (self.results, self.logs, work):
            folder.mkdir(parents=True, exist_ok=True)
        self.environment = self._environment()

    def _environment(self) -> dict[str, str]:
        """The tree as an install would show it: dualcodec_ext with the kernels inside."""
        tree = self.work / "tree"
        package = tree / "dualcodec_ext"
        found = dict(os.environ)
        found["PYTHONPATH"] = os.pathsep.join([str(tree), str(ROOT), str(ROOT / "tests")])
        found["PYTHONSAFEPATH"] = "1"
        found.setdefault("TORCHINDUCTOR_CACHE_DIR", str(self.work / "inductor"))
        peers = ROOT / "build" / "peers"
        if peers.is_dir():
            found.setdefault("DUALCODEC_EXT_PEERS", str(peers))
        default = Path("/usr/local/cuda")
        if not shutil.which("nvcc") and (default / "bin" / "nvcc").is_file():
            found.setdefault("CUDA_HOME", str(default))
        package.mkdir(parents=True, exist_ok=True)
        return found

    def link_tree(self) -> None:
        package = self.work / "tree" / "dualcodec_ext"
        wanted = {path.name: path for path in (ROOT / "dualcodec_ext").iterdir() if path.name != "__pycache__"}
        wanted["kernels"] = ROOT / "kernels"
        for old in package.iterdir():
            if old.is_symlink():
                old.unlink()
        for name, path in wanted.items():
            (package / name).symlink_to(path)

    def left(self, part: str) -> float:
        return self.ends[part] - time.monotonic()

    def note(self, step: Step) -> Step:
        self.steps.append(step)
        print(step.line(), flush=True)
        (self.logs / "summary.json").write_text(json.dumps([asdict(s) for s in self.steps], indent=1) + "\n")
        return step

    def run_all(
        self, part: str, commands: Mapping[str, Command], at_once: int = 1, limit_s: float = math.inf
    ) -> list[Step]:
        """Run commands, some at once, until the part's time or theirs is up; those that did not start are skipped."""
        waiting, running, steps = list(commands.items()), list[_Running](), list[Step]()
        end = time.monotonic() + limit_s
        while waiting or running:
            late = self.left(part) <= 0 or time.monotonic() >= end
            if late:
                steps += [self.note(Step(part, name, "skipped", 0.0, "no time was left")) for name, _ in waiting]
                waiting = []
            while waiting and len(running) < at_once:
                running.append(self._start(part, *waiting.pop(0)))
            for one in [r for r in running if late or r.process.poll() is not None]:
                running.remove(one)
                steps.append(self._finish(part, one))
            time.sleep(0.02)
        return steps

    def _start(self, part: str, name: str, command: Command) -> _Running:
        words, more = command
        path = self.logs / f"{part}-{name}.log"
        log = path.open("w")
        log.write(f"$ {' '.join(words)}\n")
        log.flush()
        environment = {**self.environment, **more}
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
        log.close()
        return _Running(name, path, process, time.monotonic())

    def _finish(self, part: str, one: _Running) -> Step:
        code = one.process.poll()
        if code is None:
            os.killpg(one.process.pid, signal.SIGKILL)
            one.process.wait()
        status = "out of time" if code is None else "failed" if code else "ok"
        lines = one.log.read_text(errors="replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        seconds = time.monotonic() - one.begun
        step = self.note(Step(part, one.name, status, seconds, f"{one.log.name}: {last[:120]}", code))
        if status != "ok":
            print("\n".join(f"    {line}" for line in lines[-25:]), flush=True)
        return step


def build(check: Check) -> None:
    found = subprocess.run([sys.executable, "-c", _GPU], capture_output=True, text=True)
    if found.returncode:
        reason = (found.stderr.strip().splitlines() or ["torch can't be imported"])[-1]
        check.note(Step("build", "module", "failed", 0.0, reason))
        return
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or found.stdout.strip()
    more = {"TORCH_CUDA_ARCH_LIST": archs, "DUALCODEC_EXT_CUDA": "1", "PYTHONSAFEPATH": ""}
    check.run_all("build", {"module": ([sys.executable, "setup.py", "build_ext", "--inplace"], more)})
    check.link_tree()
    check.run_all("build", {"doctor": ([sys.executable, "-c", "import dualcodec_ext as dx; print(dx.doctor())"], {})})


# Files and ops that take longer than the part has, by what -k is told: each test is in one of the processes.
_MODEL, _SHAPES = "(waveform or test_codes)", "(forward or tiles or shapes or edge)"
SPLIT: dict[str, dict[str, str]] = {
    "test_cuda_model": {
        "presets": f"{_MODEL} and v1",
        "others": f"{_MODEL} and not v1",
        "alone": f"not {_MODEL} and alone",
        "rest": f"not {_MODEL} and not alone",
    },
    "test_cuda_ops-snake_upsample1d": {
        "cuda": "snake_upsample1d and not triton",
        "shapes": f"snake_upsample1d and triton and {_SHAPES}",
        "triton": f"snake_upsample1d and triton and not {_SHAPES}",
    },
    "test_triton_snake_upsample1d": {"transposed": "transposed", "rest": "not transposed"},
    "test_triton_rvq": {"lookup": "lookup", "search": "not lookup"},
}


def pytests() -> dict[str, list[str]]:
    """What pytest is told in each process: one a file, and one an op where a file tests all of them."""
    files = [*sorted(path.stem for path in ROOT.glob("tests/test_cuda_*.py")), "test_graphs"]
    found = {name: [f"tests/{name}.py"] for name in files if name != "test_cuda_ops"}
    found |= {f"test_cuda_ops-{op}": ["tests/test_cuda_ops.py", "-k", op] for op in OPS}
    for path in sorted(ROOT.glob("tests/triton_ops/test_*.py")):
        found[path.stem] = [f"tests/triton_ops/{path.name}"]
    for name, parts in SPLIT.items():
        file = found.pop(name)[0]
        found |= {f"{name}-{part}": [file, "-k", told] for part, told in parts.items()}
    found["test_streaming_graphs"] = ["tests/test_streaming_graphs.py", "-k", "on_a_gpu"]
    return found


def test(check: Check) -> None:
    # Without the options that need plugins: the machine may lack them.
    options = ["-v", "--tb=short", "-o", "addopts=-ra --strict-markers", "-p", "no:cacheprovider", "--durations=5"]
    # Asked for by name, so that nothing is skipped for want of a GPU.
    more = {"DUALCODEC_EXT_TEST_DEVICE": "cuda", "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 8))}
    words: dict[str, list[str]] = {}
    for name, own in pytests().items():
        begun = check.work / "begun" / name
        begun.parent.mkdir(exist_ok=True)
        begun.unlink(missing_ok=True)
        words[name] = [sys.executable, "-m", "pytest", *options, "-p", "at_once", "--begun", str(begun), *own]
    run_through(check, "test", {name: (one, more) for name, one in words.items()})


def run_through(check: Check, part: str, commands: Mapping[str, Command], rounds: int = 6) -> None:
    """Run all commands at once, and again those that a signal ended: they go on behind what ended them."""
    for attempt in range(1, rounds + 1):
        if not commands:
            return
        named = {name if attempt == 1 else f"{name}-{attempt}": command for name, command in commands.items()}
        steps = {step.name: step for step in check.run_all(part, named, at_once=len(named))}
        commands = {
            name: command
            for (name, command), label in zip(commands.items(), named, strict=True)
            if (steps[label].code or 0) < 0
        }


def sanitize(check: Check) -> None:
    home = check.environment.get("CUDA_HOME", "/usr/local/cuda")
    places = [os.environ.get("PATH", ""), f"{home}/bin", f"{home}/compute-sanitizer"]
    program = shutil.which("compute-sanitizer", path=os.pathsep.join(places))
    if program is None:
        check.note(Step("sanitize", "tools", "failed", 0.0, "compute-sanitizer was not found"))
        return
    # An access past a tensor's end is seen where each has an allocation of its own.
    more = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    commands: dict[str, Command] = {}
    cases = {op: [op] for op in OPS} | {"beside": ["take_codes", "stream_rows"]}
    for name, chosen in cases.items():
        for tool, options in TOOLS.items():
            words = [program, "--tool", tool, "--error-exitcode", "9", *options]
            commands[f"{tool}-{name}"] = ([*words, sys.executable, "tests/sanitize_cases.py", *chosen], more)
    check.run_all("sanitize", commands, at_once=max(2, (os.cpu_count() or 1) * 3 // 4))


def bench(check: Check, part: str = "bench") -> None:
    begun = check.work / f"{part}-begun.txt"
    begun.unlink(missing_ok=True)
    words = [sys.executable, "-m", "bench.gpu_runs", "--results", str(check.results), "--begun", str(begun)]
    for group, (share, run_s) in BENCH_GROUPS[part].items():
        end = time.monotonic() + share * check.left(part)
        for attempt in range(1, 9):
            command = [*words, "--group", group, "--limit", str(run_s)]
            step = check.run_all(part, {f"{group}-{attempt}": (command, {})}, limit_s=end - time.monotonic())[0]
            # Any other end is a crash or a run past its limit: the runs behind it go on in a process of their own.
            if step.code in (0, 1, None):
                break
    files = sorted(check.results.glob("cuda-*.json"))
    if files:
        command = [sys.executable, "-m", "bench.goals", *map(str, files)]
        page = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False).stdout
        (check.results / "cuda-goals.md").write_text(page)
        print(page)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description="Build, test, sanitize, measure.")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of " + ",".join(PARTS | ASKED_FOR))
    parser.add_argument("--results", default="bench/results", help="folder for the measured JSON and Markdown")
    parser.add_argument("--logs", default=str(WORK), help="folder for logs and summary.json (build/gpu-check)")
    parser.add_argument("--seconds", type=float, default=sum(PARTS.values()), help="for all parts together (530)")
    args = parser.parse_args(argv)
    parts = [name.strip() for name in args.parts.split(",")]
    for name in parts:
        if name not in PARTS | ASKED_FOR:
            parser.error(f"--parts must name some of {', '.join(PARTS | ASKED_FOR)}, got {name}")
    check = Check(Path(args.results), args.seconds, parts, Path(args.logs))
    works: dict[str, Callable[[Check], None]] = {
        "build": build,
        "test": test,
        "sanitize": sanitize,
        "bench": bench,
        "tuned": partial(bench, part="tuned"),
    }
    for part in parts:
        check.link_tree()
        begun = time.monotonic()
        works[part](check)
        print(f"-- {part}: {time.monotonic() - begun:.0f} s", flush=True)
    print("\n".join(step.line() for step in check.steps))
    return int(any(step.status != "ok" for step in check.steps))


if __name__ == "__main__":
    sys.exit(main())
