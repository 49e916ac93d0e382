"""make gpu-check, without a GPU: parts with limits, goals from runs, and the runs themselves on the CPU."""

import gc
import json
import os
import re
import subprocess
import sys
import time
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import correctness, goals, gpu_check, gpu_runs, gpu_timing, measure, probes, registry, run, stream
from dualcodec_ext import DualCodecConfig, testing

ROOT = Path(__file__).resolve().parents[1]


def python(code: str) -> gpu_check.Command:
    return [sys.executable, "-c", code], {"ADDED": "1"}


def a_check(tmp_path: Path, seconds: float = 60.0, parts: tuple[str, ...] = ("build", "bench")) -> gpu_check.Check:
    return gpu_check.Check(tmp_path / "results", seconds, parts, tmp_path / "logs", tmp_path / "work")


def test_what_fails_stops_nothing_and_everything_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = a_check(tmp_path)
    check.run_all("build", {"right": python("import os; print('sum', os.environ['ADDED'])")})
    check.run_all("build", {"wrong": python("print('the reason'); raise SystemExit(7)"), "next": python("")}, at_once=2)
    steps = json.loads((tmp_path / "logs" / "summary.json").read_text())
    assert sorted((s["name"], s["status"], s["code"]) for s in steps) == [
        ("next", "ok", 0),
        ("right", "ok", 0),
        ("wrong", "failed", 7),
    ]
    assert "build-right.log: sum 1" in steps[0]["note"]
    assert "the reason" in capsys.readouterr().out


def test_a_part_ends_in_time_and_leaves_its_rest_to_the_next(tmp_path: Path) -> None:
    check = a_check(tmp_path, 2.0)
    assert check.left("build") < 1.1 < check.left("bench") <= 2.0
    start = time.monotonic()
    sleep = python("import time; print('begun', flush=True); time.sleep(60)")
    steps = check.run_all("build", {"long": sleep, "late": sleep})
    assert time.monotonic() - start < 30
    assert [(s.name, s.status) for s in steps] == [("late", "skipped"), ("long", "out of time")]
    assert steps[1].code is None


ENDING = """
import os, signal
def test_wrong(): assert [1] == [2]
def test_ends(): os.kill(os.getpid(), signal.SIGSEGV)
def test_right(): pass
def test_ends_too(): os.kill(os.getpid(), signal.SIGSEGV)
"""


def test_tests_go_on_behind_one_that_ended_its_process(tmp_path: Path) -> None:
    """And a failure is told at once, or it would be lost with the process."""
    check = a_check(tmp_path)
    (tmp_path / "test_some.py").write_text(ENDING)
    begun = tmp_path / "begun"
    words = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "at_once", "--begun", str(begun)]
    gpu_check.run_through(check, "build", {"some": ([*words, str(tmp_path / "test_some.py")], {})})
    steps = json.loads((tmp_path / "logs" / "summary.json").read_text())
    assert [(s["name"], s["code"]) for s in steps] == [("some", -11), ("some-2", -11), ("some-3", 0)]
    first, second, third = ((tmp_path / "logs" / f"build-{s['name']}.log").read_text() for s in steps)
    assert "assert [1] == [2]" in first and "test_right" not in first
    assert "test_right PASSED" in second and "test_wrong" not in second
    assert "4 deselected" in third


def test_every_test_of_a_gpu_runs() -> None:
    runs = [" ".join(words) for words in gpu_check.pytests().values()]
    files = [*ROOT.glob("tests/test_cuda_*.py"), *ROOT.glob("tests/triton_ops/test_*.py")]
    files += [path for path in ROOT.glob("tests/test_*.py") if re.search("^@needs_device", path.read_text(), re.M)]
    for path in files:
        assert any(str(path.relative_to(ROOT)) in words for words in runs), path


def test_a_split_leaves_no_test_out_and_runs_none_twice() -> None:
    files = {name: gpu_check.pytests()[f"{name}-{next(iter(parts))}"][0] for name, parts in gpu_check.SPLIT.items()}
    words = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", *sorted(set(files.values()))]
    environment = {**os.environ, "DUALCODEC_EXT_TEST_DEVICE": "cuda"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    listed = [line.split("::", 1) for line in done.stdout.splitlines() if "::" in line]

    def takes(told: str, name: str) -> bool:
        """As -k: words are looked for in the name."""
        words = re.sub(r"\w+", lambda m: m[0] if m[0] in ("and", "or", "not") else str(m[0] in name), told)
        return bool(eval(words))

    for split, file in files.items():
        op = split.partition("-")[2]
        names = [name.lower() for path, name in listed if path == file and op in name]
        assert names
        for name in names:
            assert sum(takes(told, name) for told in gpu_check.SPLIT[split].values()) == 1, name
        for part, told in gpu_check.SPLIT[split].items():
            assert any(takes(told, name) for name in names) or "triton" in told, part


def test_parts_and_ops_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(gpu_check.OPS) == set(registry.OPS)
    assert sum(gpu_check.PARTS.values()) < 9 * 60
    with pytest.raises(SystemExit):
        gpu_check.main(["--parts", "bake"])
    assert "--parts must name some of build, test, sanitize, bench, tuned, got bake" in capsys.readouterr().err


def test_the_tree_looks_like_an_install(tmp_path: Path) -> None:
    check = a_check(tmp_path)
    for _ in range(2):
        check.link_tree()
    code = "import dualcodec_ext.kernels, bench, opsuite; print(dualcodec_ext.__file__)"
    done = subprocess.run([sys.executable, "-c", code], env=check.environment, capture_output=True, text=True)
    assert done.stdout.startswith(str(tmp_path / "work" / "tree")), done.stderr


@pytest.mark.skipif(bool(run.missing_module()), reason="needs the compiled module")
@pytest.mark.parametrize(
    ("words", "last"),
    [
        (["tests/sanitize_cases.py", "rvq_lookup", "take_codes", "stream_rows"], "all cases ran"),
        (
            ["-m", "pytest", "-q", "tests/test_cuda_ops.py", "tests/test_cuda_rvq.py", "-k", "alone or tf32 or nan"],
            "passed",
        ),
        (["-m", "pytest", "-q", "tests/test_cuda_model.py", "-k", "nothing or raise"], "passed"),
    ],
    ids=["sanitize", "ops", "model"],
)
def test_the_gpus_tests_run_on_the_cpu(words: list[str], last: str) -> None:
    environment = {**os.environ, "DUALCODEC_EXT_TEST_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and last in done.stdout.splitlines()[-1], done.stdout + done.stderr


@pytest.mark.parametrize("name", gpu_runs.RUNS)
def test_every_run_is_a_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    words = [*gpu_runs.RUNS[name].split(), "--device", "cuda"]
    if words[0] == "stream":
        assert stream.parse(words[1:]).device == "cuda"
        return
    args = run.parse(words)
    assert args.what == name.split("-")[0] or args.ops == ("rvq_search",)


def test_the_groups_of_runs_are_those_that_have_limits() -> None:
    limited = [group for groups in gpu_check.BENCH_GROUPS.values() for group in groups]
    assert sorted(limited) == sorted(gpu_runs.GROUPS)
    # What takes minutes to compile is not in what is to end within nine.
    assert "autotune" not in " ".join(
        run for g in gpu_check.BENCH_GROUPS["bench"] for run in gpu_runs.GROUPS[g].values()
    )
    assert sum(len(group) for group in gpu_runs.GROUPS.values()) == len(gpu_runs.RUNS)


def test_a_run_past_its_limit_ends_its_process_and_the_next_goes_on(tmp_path: Path) -> None:
    code = (
        "import sys, time; from bench import gpu_runs, run; run.main = lambda words: {}; sys.exit(gpu_runs.main({!r}))"
    )
    words = ["--results", str(tmp_path), "--begun", str(tmp_path / "begun.txt"), "--device", "cpu", "--limit", "0.2"]
    words += ["--only", "decode-12hz_v1-b1"]
    for work, status in (("time.sleep(60) or 0", 4), ("0", 0)):
        done = subprocess.run(
            [sys.executable, "-c", code.format(work, words)], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == status, done.stderr
    assert (tmp_path / "begun.txt").read_text() == "decode-12hz_v1-b1\n"


@pytest.fixture
def tiny_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(DualCodecConfig.from_dict(testing.TINY).to_dict()))
    return path


def test_runs_leave_results_and_go_on_where_a_process_ended(
    tmp_path: Path, tiny_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probes, "measure", lambda *_: probes.Ceilings(1.0, 1.0, {}, {1 << 20: 1.0}, 1.0))
    short = f"--config {tiny_file} --seconds 0.005 --rounds 1 --threads 1"
    monkeypatch.setattr(
        gpu_runs, "RUNS", {"one": "decode --peers none", "two": "ops --ops rvq_search --batch 3 --peers none"}
    )
    begun = tmp_path / "begun.txt"
    begun.write_text("one\n")
    words = ["--results", str(tmp_path), "--begun", str(begun), "--device", "cpu", "--more", short]
    code = gpu_runs.main(words)
    assert code == (1 if run.missing_module() else 0)
    assert not (tmp_path / "cpu-one.json").exists() and begun.read_text().split() == ["one", "two"]
    found = json.loads((tmp_path / "cpu-two.json").read_text())
    assert [c["where"] for c in found["cases"]] == ["semantic", "acoustic"]
    assert found["cases"][1]["op"] == "rvq_search" and found["cases"][1]["steps"] == 3 * 4
    assert "B=3" in (tmp_path / "cpu-two.md").read_text()
    assert "== two: python -m bench ops" in capsys.readouterr().out


# Goals


def a_run(started: str, batch: int, p50_s: float, peers: dict[str, float]) -> dict[str, object]:
    def side(name: str, seconds: float, ours: bool) -> dict[str, object]:
        return {"side": name, "ours": ours, "status": "timed", "p50_s": seconds, "peak_extra_bytes": 2**21}

    sides = [side("dualcodec_ext", p50_s, True), *(side(name, s, False) for name, s in peers.items())]
    case = {"case": "decode", "model": "12hz_v1", "batch": batch, "item_frames": 125, "sides": sides}
    facts = {"what": "decode", "dtype": "bfloat16", "device": "cuda", "started": started, "commit": "abc"}
    return {**facts, "machine": {"gpu": "a GPU", "cpu": "a CPU"}, "cases": [case]}


def test_goals_are_read_off_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        a_run("2026-01-02", 1, 0.6e-3, {"pypi-fp16": 9e-3}),
        a_run("2026-01-01", 1, 0.4e-3, {"autotune-bf16": 0.8e-3}),
        a_run("2026-01-01", 32, 11e-3, {"pypi-fp16": 66e-3, "folded-bf16": 44e-3}),
    ]
    table = {cells[0]: cells[1:] for cells in goals.rows(runs)}
    assert table["decode 12hz_v1, 1 x 10 s, bf16"] == [
        "700, then 500",
        "600",
        "met",
        "pypi-fp16 15.0x (>= 10x); autotune-bf16 2.0x (>= 3x)",
        "2",
    ]
    assert table["decode 12hz_v1, 32 x 10 s, bf16"][1:4] == ["11000", "missed", "the best peer 4.0x (>= 3x)"]
    assert table["decode of one frame, batch 1, bf16"][2] == "not measured"
    paths = [tmp_path / f"{i}.json" for i in range(3)]
    for path, one in zip(paths, runs, strict=True):
        path.write_text(json.dumps(one))
    assert goals.main([str(path) for path in paths]) == 0
    page = capsys.readouterr().out
    assert page.startswith("a GPU, commit abc\n\n| goal |") and page.count("\n| ") == 2 + len(goals.GOALS)


# Timing on a device, with a recording that repeats calls on the CPU


def test_calls_are_repeated_from_a_recording() -> None:
    counts = {"calls": 0, "replays": 0}

    def call() -> None:
        counts["calls"] += 1
        time.sleep(0.0002)

    def recorder(once: gpu_timing.Call, count: int) -> gpu_timing.Call:
        assert count > 1

        def replay() -> None:
            counts["replays"] += 1
            time.sleep(0.001)

        return replay

    made = gpu_timing.repeated(call, "cpu", recorder)
    before = counts["replays"]
    made()
    assert made.graph and counts["replays"] - before == made.replays
    assert made.calls % made.replays == 0 and made.how == f"{made.calls} calls, in a CUDA graph"


def test_what_a_recording_reads_lives_as_long_as_it() -> None:
    tensor = torch.zeros(1)
    held = weakref.ref(tensor)
    made = gpu_timing.repeated(partial(tensor.add_, 1), "cpu", lambda call, count: lambda: time.sleep(0.001))
    del tensor
    gc.collect()
    assert held() is not None
    del made
    gc.collect()
    assert held() is None


def test_samples_of_repeated_calls_are_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = torch.zeros(1, 1, 10, dtype=torch.float64)

    def build() -> gpu_timing.Call:
        return lambda: time.sleep(0.0005) or wanted.float()

    def recorder(once: gpu_timing.Call, count: int) -> gpu_timing.Call:
        return lambda: [once() for _ in range(count)]

    monkeypatch.setattr(measure, "repeated", lambda call, device: gpu_timing.repeated(call, device, recorder))
    case = measure.Case("a case", 1.0, lambda dtype: 1.0, 1.0, 1, correctness.WaveCheck(wanted), {"op": "some"})
    side = measure.Side("ours", "ours", torch.float32, build, ours=True)
    how = measure.Timing(2, settle_s=0.0, record=True)
    found = measure.describe(case, measure.measure_case(case, [side], how), {})
    assert found["op"] == "some" and found["sides"][0]["timed"].endswith("in a CUDA graph")
    assert 0.0005 <= min(found["sides"][0]["samples_s"]) < 0.004  # which all calls of a sample together take at least
    monkeypatch.setattr(measure, "repeated", lambda call, device: 1 / 0)
    assert [o.status for o in measure.measure_case(case, [side], how)] == ["failed"]


def test_what_cannot_be_recorded_is_repeated_one_by_one() -> None:
    def refuse(once: gpu_timing.Call, count: int) -> gpu_timing.Call:
        raise RuntimeError("operation not permitted when stream is capturing")

    made = gpu_timing.repeated(lambda: time.sleep(0.001), "cpu", refuse)
    assert not made.graph and 1 <= made.calls == made.replays <= 5


def test_ceilings_of_a_device() -> None:
    found = probes._measure_device(torch.float32, "cpu", 0.002, (32,), 64, (1 << 16, 1 << 18))
    assert list(found.copy_gbs) == [1 << 16, 1 << 18]
    assert found.gemm_gflops == max(found.gemm_by_kernel.values()) > 0 < found.read_gbs
