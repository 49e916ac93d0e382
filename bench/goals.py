"""`python -m bench.goals bench/results/cuda-*.json`: one row per goal on an H100, with what the runs measured.

Runs on a CPU (`bench/results/cpu-*.json`) are held to the goals of `cpu_goals`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import cpu_goals

BEST_PEER = "the best peer"
_BF16_DECODE = {"what": "decode", "model": "12hz_v1", "dtype": "bfloat16", "device": "cuda"}
_BF16_STEP = {"what": "stream", "model": "12hz_causal", "dtype": "bfloat16", "device": "cuda"}


@dataclass(frozen=True)
class Goal:
    """What one call is to take, and how many times as long its peers may take at least."""

    name: str
    limit_s: float
    then_s: float | None
    case: Mapping[str, Any]  # what the run and its case must hold
    peers: Mapping[str, float] = field(default_factory=dict)


GOALS = (
    Goal(
        "decode 12hz_v1, 1 x 10 s, bf16",
        0.7e-3,
        0.5e-3,
        _BF16_DECODE | {"batch": 1, "item_frames": 125},
        {"pypi-fp16": 10.0, "autotune-bf16": 3.0},
    ),
    Goal(
        "decode 12hz_v1, 32 x 10 s, bf16",
        10e-3,
        None,
        _BF16_DECODE | {"batch": 32, "item_frames": 125},
        {BEST_PEER: 3.0},
    ),
    Goal("decode of one frame, batch 1, bf16", 120e-6, None, _BF16_DECODE | {"batch": 1, "item_frames": 1}),
    Goal("decode of one frame, batch 32, bf16", 200e-6, None, _BF16_DECODE | {"batch": 32, "item_frames": 1}),
    Goal(
        "encode 12hz_v1, 32 x 10 s, bf16, search fp32",
        10e-3,
        None,
        _BF16_DECODE | {"what": "encode", "batch": 32, "item_frames": 125},
    ),
    Goal(
        "rvq_search, 2000 frames x 7 x 4096, fp32",
        60e-6,
        35e-6,
        {"what": "ops", "op": "rvq_search", "where": "acoustic", "model": "12hz_v1", "steps": 2000}
        | {"dtype": "float32", "device": "cuda"},
    ),
    Goal("a step of StreamingDecoder, batch 1, bf16", 120e-6, None, _BF16_STEP | {"batch": 1}),
    Goal("a step of StreamingDecoder, batch 32, bf16", 200e-6, None, _BF16_STEP | {"batch": 32}),
)


def _ours(case: Mapping[str, Any]) -> Mapping[str, Any] | None:
    timed = [row for row in case["sides"] if row["ours"] and row["status"] == "timed"]
    return min(timed, key=lambda row: row["p50_s"]) if timed else None


def _ratio(cases: Sequence[Mapping[str, Any]], peer: str) -> float | None:
    """How many times as long a peer takes, the newest run that timed both."""
    for case in cases:
        ours = _ours(case)
        theirs = [
            row["p50_s"]
            for row in case["sides"]
            if row["status"] == "timed" and not row["ours"] and peer in (row["side"], BEST_PEER)
        ]
        if ours is not None and theirs and peer != BEST_PEER:
            return theirs[0] / ours["p50_s"]
    # The best peer may be timed in a run of its own.
    found = [
        row["p50_s"] / ours["p50_s"]
        for case in cases
        if (ours := _ours(case)) is not None
        for row in case["sides"]
        if row["status"] == "timed" and not row["ours"]
    ]
    return min(found, default=None) if peer == BEST_PEER else None


def _us(seconds: float | None) -> str:
    """Three digits, all of them above a thousand."""
    if seconds is None:
        return "-"
    micros = seconds * 1e6
    return f"{micros:.0f}" if micros >= 100 else f"{micros:.3g}"


def rows(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Cells: the goal, its limits, the measured median in microseconds, the verdict, the peers, the memory."""
    table = []
    for goal in GOALS:
        cases = list(cpu_goals.matching(runs, goal.case))
        best = next((row for case in cases if (row := _ours(case)) is not None), None)
        p50 = None if best is None else best["p50_s"]
        verdict = "not measured" if p50 is None else "met" if p50 <= goal.limit_s else "missed"
        if p50 is not None and goal.then_s is not None and p50 <= goal.then_s:
            verdict = "met, and the next"
        told = []
        for peer, wanted in goal.peers.items():
            ratio = _ratio(cases, peer)
            told.append(f"{peer} {'-' if ratio is None else f'{ratio:.1f}x'} (>= {wanted:g}x)")
        peak = None if best is None else best["peak_extra_bytes"]
        limits = f"{_us(goal.limit_s)}" + ("" if goal.then_s is None else f", then {_us(goal.then_s)}")
        memory = "-" if peak is None else f"{peak / 2**20:.0f}"
        table.append([goal.name, limits, _us(p50), verdict, "; ".join(told) or "-", memory])
    return table


TITLES = ["goal", "limit us", "measured us", "verdict", "peers", "peak MiB beyond weights"]


def markdown(runs: Sequence[Mapping[str, Any]]) -> str:
    machines = sorted({f"{r['machine'].get('gpu') or r['machine']['cpu']}, commit {r['commit']}" for r in runs})
    lines = machines
    for device, titles, table in (("cuda", TITLES, rows), ("cpu", cpu_goals.TITLES, cpu_goals.rows)):
        here = [run for run in runs if run["device"] == device]
        if here:
            cells = [titles, ["---"] * len(titles), *table(here)]
            lines += ["", *("| " + " | ".join(line) + " |" for line in cells)]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.goals", description="Goals beside what runs measured.")
    parser.add_argument("runs", nargs="+", help="JSON files of python -m bench")
    args = parser.parse_args(argv)
    try:
        runs = [json.loads(Path(name).read_text(encoding="utf-8")) for name in args.runs]
    except (OSError, ValueError) as error:
        parser.error(f"runs must be JSON files of python -m bench: {error}")
    print(markdown(runs), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
