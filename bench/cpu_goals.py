"""The goals on a CPU, and what the runs of `make bench-cpu` measured: one row per demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Case = Mapping[str, Any]
Row = Mapping[str, Any]


def timed(case: Case, side: str) -> Row | None:
    """The row of a side that was timed."""
    return next((row for row in case["sides"] if row["side"] == side and row["status"] == "timed"), None)


def best_peer(case: Case, dtype: str | None = None) -> Row | None:
    """The fastest side that is not ours, of one dtype or of any."""
    found = [row for row in case["sides"] if row["status"] == "timed" and not row["ours"]]
    found = [row for row in found if dtype in (None, row["dtype"])]
    return min(found, key=lambda row: row["p50_s"], default=None)


def over_best_peer(ours: Row, case: Case) -> float | None:
    peer = best_peer(case, ours["dtype"])
    return None if peer is None else peer["p50_s"] / ours["p50_s"]


def over(peer: str) -> Callable[[Row, Case], float | None]:
    def ratio(ours: Row, case: Case) -> float | None:
        row = timed(case, peer)
        return None if row is None else row["p50_s"] / ours["p50_s"]

    return ratio


def share_of_limit(ours: Row, case: Case) -> float | None:
    return ours.get("share_of_limit")


def of_one_read(ours: Row, case: Case) -> float | None:
    read = best_peer(case)
    return None if read is None else ours["p50_s"] / read["p50_s"]


def late_of_one_read(ours: Row, case: Case) -> float | None:
    read = best_peer(case)
    return None if read is None else ours["p99_s"] / read["p50_s"]


def pace(ours: Row, case: Case) -> float | None:
    return float(ours["times_real_time"])


def core_us(ours: Row, case: Case) -> float | None:
    return ours["frame_us"] * case["threads"]


@dataclass(frozen=True)
class Demand:
    """A number that a side is to reach."""

    what: str
    limit: float
    measure: Callable[[Row, Case], float | None]
    unit: str = "x"  # "%": a share; "us" and "reads": not above the limit

    def text(self, value: float | None) -> str:
        if value is None:
            return "-"
        return (
            f"{100 * value:.0f} %" if self.unit == "%" else f"{value:.3g} us" if self.unit == "us" else f"{value:.2f}x"
        )

    def met(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit

    @property
    def at_most(self) -> bool:
        return self.unit in ("us", "reads")


@dataclass(frozen=True)
class Goal:
    """A side of a case."""

    name: str
    case: Mapping[str, Any]  # what the run and its case must hold
    side: str
    demands: tuple[Demand, ...]
    direct: bool = False  # computes as many products as the limit counts


_MOST_OF_LIMIT = 0.95


def verdict(goal: Goal, demand: Demand, value: float | None, ours: Row | None) -> str:
    """Say how a demand stands; of a ratio that takes more than 95 % of the direct limit, that the share counts."""
    if value is None or ours is None:
        return "not measured"
    if demand.met(value):
        return "met"
    share = share_of_limit(ours, {})
    if goal.direct and demand.unit == "x" and share is not None and share * demand.limit / value > _MOST_OF_LIMIT:
        return f"the share counts: takes {100 * share * demand.limit / value:.0f} %"
    return "missed"


def _demands(peer: float | None, limit: float | None, pypi: float) -> tuple[Demand, ...]:
    found = [] if peer is None else [Demand("the fastest peer", peer, over_best_peer)]
    found += [] if limit is None else [Demand("the direct limit", limit, share_of_limit, "%")]
    return (*found, Demand("the PyPI package", pypi, over("pypi")))


def _codec(what: str, model: str, dtype: str = "float32") -> dict[str, Any]:
    return {"what": what, "model": model, "dtype": dtype, "device": "cpu", "batch": 1, "seconds": 10.0}


_OURS, _FAST = "dualcodec_ext", "dualcodec_ext fast"
GOALS = (
    Goal("decode 12hz_v1, fp32, exact", _codec("decode", "12hz_v1"), _OURS, _demands(1.3, 0.9, 3)),
    Goal("decode 12hz_v1, fp32, fast", _codec("decode", "12hz_v1"), _FAST, _demands(2, 1.4, 4.5)),
    Goal("decode 25hz_v1, fp32, exact", _codec("decode", "25hz_v1"), _OURS, _demands(1.2, 0.9, 2.5)),
    Goal("decode 25hz_v1, fp32, fast", _codec("decode", "25hz_v1"), _FAST, _demands(1.8, 1.35, 3.8)),
    Goal("decode 12hz_v1, bf16", _codec("decode", "12hz_v1", "bfloat16"), _OURS, _demands(1.7, 0.85, 5), True),
    Goal("decode 25hz_v1, bf16", _codec("decode", "25hz_v1", "bfloat16"), _OURS, _demands(1.4, 0.85, 4.7), True),
    Goal("encode 12hz_v1, fp32", _codec("encode", "12hz_v1"), _OURS, _demands(None, 0.8, 2.3), True),
    Goal("encode 25hz_v1, fp32", _codec("encode", "25hz_v1"), _OURS, _demands(None, 0.8, 2.3), True),
    Goal(
        "decode tiny, fp32, on two cores",
        _codec("decode", "tiny") | {"threads": 2},
        _OURS,
        (Demand("real time", 100, pace),),
    ),
    Goal(
        "rvq_search 12hz_v1, 7 x 4096",
        {"what": "ops", "model": "12hz_v1", "op": "rvq_search", "where": "acoustic", "device": "cpu"},
        _OURS,
        (
            Demand("faiss-cpu", 1.5, over("faiss")),
            Demand("a frame and core", 5, core_us, "us"),
            Demand("PyTorch eager", 3, over("eager")),
        ),
    ),
    Goal(
        "one streamed frame, 12hz_v1's shapes, fp32",
        {"what": "stream", "model": "12hz_causal", "dtype": "float32", "device": "cpu", "batch": 1},
        _OURS,
        (
            Demand("one read of the weights", 1.5, of_one_read, "reads"),
            Demand("the same, at the 99th percentile", 2, late_of_one_read, "reads"),
        ),
    ),
    Goal(
        "16 streams side by side, 12hz_v1's shapes, fp32",
        {"what": "stream", "model": "12hz_causal", "dtype": "float32", "device": "cpu", "batch": 16},
        _OURS,
        (Demand("real time", 1, pace),),
    ),
    Goal(
        "encode with w2v-BERT, fp32",
        {"what": "inference", "model": "12hz_v1"},
        _OURS,
        (Demand("the PyPI package", 1.5, over("pypi")),),
    ),
    Goal(
        "encode with w2v-BERT, bf16 features",
        {"what": "inference", "model": "12hz_v1"},
        "dualcodec_ext bf16",
        (Demand("the PyPI package", 4, over("pypi")),),
    ),
)


def matching(runs: Sequence[Mapping[str, Any]], wanted: Mapping[str, Any]) -> Iterator[Case]:
    """The cases of all runs that hold what a goal wants, the newest run first."""
    for run in sorted(runs, key=lambda r: r["started"], reverse=True):
        for case in run["cases"]:
            facts = {**{k: v for k, v in run.items() if k != "cases"}, **case}
            if all(facts.get(k) == v for k, v in wanted.items()):
                yield facts


TITLES = ["goal", "over or of", "wanted", "measured", "verdict", "x real time", "error against float64"]


def rows(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Cells, one line per demand."""
    table = []
    for goal in GOALS:
        pairs = ((timed(case, goal.side), case) for case in matching(runs, goal.case))
        ours, case = next((pair for pair in pairs if pair[0] is not None), (None, {}))
        speed = "-" if ours is None else f"{ours['times_real_time']:.1f}"
        error = "-" if ours is None else ours.get("error", {}).get("text", "-")
        for demand in goal.demands:
            value = None if ours is None else demand.measure(ours, case)
            sign = "<=" if demand.at_most else ">="
            wanted = f"{sign} {demand.text(demand.limit)}"
            table.append(
                [goal.name, demand.what, wanted, demand.text(value), verdict(goal, demand, value, ours), speed, error]
            )
    return table
