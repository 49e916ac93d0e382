"""What `bench.gpu_kernels` reads from a profiler's trace, and what the README says of it."""

import json
from pathlib import Path

import pytest

from bench import gpu_kernels, readme


def event(at: int, name: str, us: float, grid: int = 1, kind: str = "kernel") -> dict:
    return {"cat": kind, "ts": at, "name": name, "dur": us, "args": {"grid": [grid, 1, 1]}}


def test_kernels_of_the_last_call_in_order_close_ones_together() -> None:
    once = [
        ("void dcx::Conv<4>(dcx::Params)", 5.0, 3),
        ("void rows(int)", 1.0, 1),
        ("void dcx::Conv<4>(dcx::P)", 7.0, 3),
    ]
    trace = [event(call * 10 + i, *one) for call in range(2) for i, one in enumerate(once)]
    trace += [event(3, "Memcpy", 9.0, kind="gpu_memcpy"), event(25, "void last()", 2.0, 9)]
    found = gpu_kernels.kernels(list(reversed(trace[:-1])), 2)
    assert [(row["kernel"], row["count"], row["us"], row["grid"][0]) for row in found] == [
        ("Conv<4>", 2, 12.0, 3),
        ("rows", 1, 1.0, 1),
    ]


def test_how_much_later_kernels_end_adds_up_to_the_call() -> None:
    """The second comes up while the first runs, the third ends before the second."""
    trace = [event(0.0, "void a()", 5.0, 1), event(1.0, "void b()", 9.0, 1), event(2.0, "void c()", 3.0, 1)]
    found = gpu_kernels.kernels([*trace, event(11.0, "void d()", 2.0, 1)], 1)
    assert [row["later_us"] for row in found] == [5.0, 5.0, 0.0, 3.0]


def test_a_call_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_kernels.main(["--calls", "d1,d64"])
    assert "--calls must name some of d1, d32, f1, f32, e1, e32, s1, s32, got d64" in capsys.readouterr().err


def test_the_readme_takes_the_newest_run_of_each_call() -> None:
    runs = json.loads((Path(__file__).parent.parent / "bench/results/gpu-kernels.json").read_text())
    text = readme.on_a_gpu(runs)
    newest = runs[-1]["calls"]["d32"]["median_ms"]
    assert f"| decode, 32 x 10 s | {newest:.2f} ms | 10 ms | {runs[-1]['gpu']} | {runs[-1]['commit']} |" in text
    older = readme.on_a_gpu([*runs[:2], {**runs[2], "calls": {"d1": runs[2]["calls"]["d1"]}}])
    assert f"| encode, 32 x 10 s | {runs[1]['calls']['e32']['median_ms']:.2f} ms | 10 ms |" in older
