"""One case: build every side, check it, and only then time those that are right, in turn."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .correctness import Verdict
from .gpu_timing import Repeated, repeated, synchronize
from .machine import peak_extra_bytes
from .peers.base import Call, Unavailable
from .probes import Ceilings, Products
from .timing import interleave, ratio, summarize

TIMED, UNAVAILABLE, FAILED, WRONG = "timed", "unavailable", "failed", "wrong"


@dataclass(frozen=True)
class Side:
    """Somebody who can run the case."""

    name: str
    what: str
    dtype: torch.dtype
    build: Callable[[], Call]
    ours: bool = False
    fast: bool = False
    counts: Callable[[], dict[str, int]] | None = None  # what the side has counted since it was last asked


@dataclass
class Outcome:
    """What came of a side."""

    side: Side
    status: str
    reason: str = ""
    prepare_s: float | None = None
    verdict: Verdict | None = None
    peak_bytes: int | None = None
    counts: dict[str, int] = field(default_factory=dict)  # of one call
    timed: str = "call by call"
    samples_s: list[float] = field(default_factory=list)
    gemm_gflops: list[float] = field(default_factory=list)  # of the products that ran in the same rounds


@dataclass(frozen=True)
class Case:
    """Something to run, and what it costs at least."""

    name: str
    flops: float
    touched_bytes: Callable[[torch.dtype], float]
    audio_s: float
    frames: int
    check: Callable[..., Verdict]  # (output, dtype, ours=, fast=)
    facts: dict[str, Any] = field(default_factory=dict)  # what a program that reads the run picks the case by


@dataclass(frozen=True)
class Timing:
    """How to time."""

    rounds: int
    warmup: int = 1
    min_sample_s: float = 0.0
    settle_s: float = 0.02
    memory: bool = False
    device: str = "cpu"
    record: bool = False  # calls in a CUDA graph: the time of the kernels; otherwise what a caller waits for


def _one_line(error: BaseException, limit: int = 160) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{type(error).__name__}: {text}"[:limit]


def _synchronous(call: Call, device: str) -> Call:
    if device == "cpu":
        return call

    def waited() -> object:
        found = call()
        synchronize(device)
        return found

    return waited


def _held_to(side: Side, device: str) -> torch.dtype:
    """PyTorch's convolutions on a GPU use TF32 by default, which has float16's mantissa."""
    tf32 = device != "cpu" and side.dtype == torch.float32 and not side.ours
    return torch.float16 if tf32 else side.dtype


def _prepare(case: Case, side: Side, timing: Timing) -> tuple[Outcome, Call | None]:
    start = time.perf_counter()
    try:
        built = side.build()
        call = _synchronous(built, timing.device)
        if side.counts is not None:
            side.counts()
        output = call()
    except Unavailable as why:
        return Outcome(side, UNAVAILABLE, str(why)), None
    except Exception as error:  # whatever a side raises ends that side and no other
        return Outcome(side, FAILED, _one_line(error)), None
    outcome = Outcome(side, TIMED, prepare_s=time.perf_counter() - start)
    outcome.counts = {} if side.counts is None else side.counts()
    outcome.verdict = case.check(output, _held_to(side, timing.device), ours=side.ours, fast=side.fast)
    if not outcome.verdict.ok:
        outcome.status, outcome.reason = WRONG, f"wrong: {outcome.verdict.text}; not timed"
        return outcome, None
    del output
    try:
        if timing.memory:
            outcome.peak_bytes = peak_extra_bytes(getattr(built, "eager", call), timing.device)
        if timing.record:
            call = repeated(built, timing.device)
            outcome.timed = call.how
    except Exception as error:
        outcome.status, outcome.reason = FAILED, _one_line(error)
        return outcome, None
    return outcome, call


def measure_case(
    case: Case, sides: Sequence[Side], timing: Timing, limits: Mapping[torch.dtype, Products] | None = None
) -> list[Outcome]:
    """Build, check and time all sides of a case, in the order given, and in every round the products of `limits`."""
    outcomes: list[Outcome] = []
    calls: list[Call] = []
    for side in sides:
        if timing.device != "cpu":  # an illegal access shows in whatever comes next: the last name is whose it was
            print(f"  {side.name} ...", flush=True)
        outcome, call = _prepare(case, side, timing)
        if outcome.status == FAILED and timing.device != "cpu":
            print(f"  {side.name}: {outcome.reason}", flush=True)
        outcomes.append(outcome)
        if call is not None:
            calls.append(call)
        gc.collect()
    timed = [outcome for outcome in outcomes if outcome.status == TIMED]
    limits = limits or {}
    products = {o.side.dtype: limits[o.side.dtype] for o in timed if o.side.dtype in limits}
    if calls:
        found = interleave(
            [*calls, *(each.call for each in products.values())],
            timing.rounds,
            warmup=timing.warmup,
            min_sample_s=timing.min_sample_s,
            settle_s=timing.settle_s,
        )
        rates = {
            dtype: [each.flops / sample / 1e9 for sample in samples]
            for (dtype, each), samples in zip(products.items(), found[len(calls) :], strict=True)
        }
        for outcome, call, samples in zip(timed, calls, found[: len(calls)], strict=True):
            count = call.calls if isinstance(call, Repeated) else 1
            outcome.samples_s = [sample / count for sample in samples]
            outcome.gemm_gflops = rates.get(outcome.side.dtype, [])
    if "torch._dynamo" in sys.modules:
        # Compiled graphs of finished cases would pile up, one per shape.
        torch.compiler.reset()
    return outcomes


def describe(case: Case, outcomes: Sequence[Outcome], ceilings: dict[torch.dtype, Ceilings]) -> dict[str, Any]:
    """Everything about a case as plain numbers; what the tables are printed from.

    `ours_is_faster` is the ratio to the side that is ours and exact; the ratios of ours itself are 1. `share_of_limit`
    is the median over the rounds, of the products that ran in each, where there are such, else of those before them.
    """
    ours = next((o for o in outcomes if o.side.ours and not o.side.fast and o.status == TIMED), None)
    rows = []
    for outcome in outcomes:
        side = outcome.side
        row: dict[str, Any] = {
            "side": side.name,
            "what": side.what,
            "dtype": str(side.dtype).removeprefix("torch."),
            "ours": side.ours,
            "status": outcome.status,
            "reason": outcome.reason,
            "prepare_s": outcome.prepare_s,
            "peak_extra_bytes": outcome.peak_bytes,
            "timed": outcome.timed,
            "counts": outcome.counts,
            "samples_s": outcome.samples_s,
        }
        if outcome.verdict is not None:
            row["error"] = {"text": outcome.verdict.text, **outcome.verdict.numbers}
        if outcome.status == TIMED:
            summary = summarize(outcome.samples_s)
            touched = case.touched_bytes(side.dtype)
            row |= {"p20_s": summary.p20_s, "p50_s": summary.p50_s, "p80_s": summary.p80_s}
            row |= {
                "times_real_time": case.audio_s / summary.p50_s,
                "frame_us": summary.p50_s / case.frames * 1e6,
                "gflops": case.flops / summary.p50_s / 1e9,
                "gbs": touched / summary.p50_s / 1e9,
                "touched_bytes": touched,
            }
            ceiling = ceilings.get(side.dtype)
            if ceiling is not None:
                row["share_of_gemm"] = row["gflops"] / ceiling.gemm_gflops
                row["share_of_copy"] = row["gbs"] / ceiling.copy_for(touched)
                row["share_of_limit"] = ceiling.limit_s(case.flops, touched) / summary.p50_s
                if outcome.gemm_gflops:
                    limits_s = [ceiling.limit_s(case.flops, touched, rate) for rate in outcome.gemm_gflops]
                    pairs = [limit / sample for limit, sample in zip(limits_s, outcome.samples_s, strict=True)]
                    row |= {"gemm_gflops": outcome.gemm_gflops, "share_of_limit": statistics.median(pairs)}
            if ours is not None:
                against = ratio(outcome.samples_s, ours.samples_s)
                row["ours_is_faster"] = {
                    "of_medians": against.of_medians,
                    "paired_median": against.paired_median,
                }
        rows.append(row)
    return {
        "case": case.name,
        **case.facts,
        "flops": case.flops,
        "audio_s": case.audio_s,
        "frames": case.frames,
        "sides": rows,
    }
