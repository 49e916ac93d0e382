"""Timing in turn: every side runs once per round, A B C A B C, so that a slow spell of the machine hits all
of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Call = Callable[[], object]


@dataclass(frozen=True)
class Summary:
    p20_s: float
    p50_s: float
    p80_s: float
    rounds: int


def percentile(samples: Sequence[float], percent: float) -> float:
    """Linear interpolation between the closest ranks."""
    ordered = sorted(samples)
    at = (len(ordered) - 1) * percent / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def summarize(samples: Sequence[float]) -> Summary:
    return Summary(percentile(samples, 20), percentile(samples, 50), percentile(samples, 80), len(samples))


@dataclass(frozen=True)
class Ratio:
    """How many times as long `peer` takes as `ours`."""

    of_medians: float
    paired_median: float


def ratio(peer: Sequence[float], ours: Sequence[float]) -> Ratio:
    """Both ways to compare two sides timed in turn.

    The ratio of medians is what a user sees. The median of per-round ratios is steadier where the machine
    drifts, since the two sides of a round ran next to each other. Where they differ much, the run is not to
    be trusted.
    """
    if len(peer) != len(ours):
        raise ValueError(f"ratio: samples must pair up, got {len(peer)} and {len(ours)}")
    pairs = [p / o for p, o in zip(peer, ours, strict=True)]
    return Ratio(statistics.median(peer) / statistics.median(ours), statistics.median(pairs))


def repeats_for(call: Call, min_sample_s: float, clock: Callable[[], float] = time.perf_counter) -> int:
    """Calls per sample, so that one sample lasts about `min_sample_s`; a call longer than that runs once."""
    repeats = 1
    while True:
        start = clock()
        for _ in range(repeats):
            call()
        spent = clock() - start
        if spent >= min_sample_s or repeats >= 1 << 16:
            return repeats
        repeats = min(repeats * 8, max(repeats + 1, int(repeats * min_sample_s / max(spent, 1e-9)) + 1))


def interleave(
    calls: Sequence[Call],
    rounds: int,
    *,
    warmup: int = 1,
    min_sample_s: float = 0.0,
    settle_s: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Time several calls in turn.

    Args:
        calls: what to time; each must have finished its work when it returns.
        rounds: samples per call, one per round, at least 1.
        warmup: untimed calls of each side before the first round.
        min_sample_s: a sample repeats its call until it lasts about this long; 0 for one call per sample.
        settle_s: pause before each sample. OpenMP and ONNX Runtime threads spin for some milliseconds when
            their work is done, which would be charged to the next side.
        clock: seconds, rising.

    Returns:
        Seconds per call, [side][round].
    """
    if rounds < 1:
        raise ValueError(f"interleave: rounds must be at least 1, got {rounds}")
    for call in calls:
        for _ in range(warmup):
            call()
    repeats = [repeats_for(call, min_sample_s, clock) if min_sample_s > 0 else 1 for call in calls]
    samples: list[list[float]] = [[] for _ in calls]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for call, count, mine in zip(calls, repeats, samples, strict=True):
                if settle_s > 0:
                    time.sleep(settle_s)
                start = clock()
                for _ in range(count):
                    call()
                mine.append((clock() - start) / count)
            # Between rounds, where no side is charged for it.
            gc.collect(0)
    finally:
        if collecting:
            gc.enable()
    return samples
