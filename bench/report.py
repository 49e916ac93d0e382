"""The tables: fixed width for a terminal, Markdown for a page. Both print what `measure.describe` holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_COLUMNS = (
    "side",
    "p20 ms",
    "p50 ms",
    "p80 ms",
    "{pace}",
    "/ours",
    "paired",
    "GFLOP/s",
    "gemm",
    "GB/s",
    "copy",
    "limit",
)


def _number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits without an exponent."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    whole = len(str(int(abs(value))))
    return f"{value:.{max(0, digits - whole)}f}" if abs(value) >= 1 else f"{value:.{digits}g}"


def _ms(seconds: float) -> str:
    """Four significant digits."""
    return f"{seconds * 1e3:#.4g}".rstrip(".") if seconds < 10 else f"{seconds * 1e3:.0f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def header_lines(run: Mapping[str, Any]) -> list[str]:
    """Device, threads, torch and commit on the first line, the ceilings below."""
    machine = run["machine"]
    commit = (run["commit"] or "no commit")[:12] + ("+changes" if run["dirty"] else "")
    device = machine.get("gpu") or machine["cpu"]
    widest = next((x for x in ("avx512f", "avx2") if x in machine["isa"]), "no AVX2")
    where = f"{device} ({machine['cores']} cores, {widest})"
    lines = [f"{where} | {run['threads']} threads | torch {machine['torch']} | {run['dtype']} | commit {commit}"]
    for dtype, ceiling in run["ceilings"].items():
        copies = ", ".join(f"{int(size) >> 20} MiB {rate:.0f}" for size, rate in ceiling["copy_gbs"].items())
        lines.append(
            f"measured ceiling, {dtype}: GEMM {ceiling['gemm_gflops']:.0f} GFLOP/s (best width "
            f"{ceiling['gemm_peak_gflops']:.0f}); copy {copies} GB/s; read {ceiling['read_gbs']:.0f} GB/s"
        )
    return lines


def _cells(case: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    if row["status"] != "timed":
        return [
            row["side"],
            row["reason"] if row["status"] == "wrong" else f"{row['status']}: {row['reason']}",
        ]
    faster = row.get("ours_is_faster", {})
    pace = row["frame_us"] if case["per_frame"] else row["times_real_time"]
    cells = [
        row["side"],
        *(_ms(row[key]) for key in ("p20_s", "p50_s", "p80_s")),
        _number(pace),
        *("-" if x is None else f"{x:.2f}x" for x in (faster.get("of_medians"), faster.get("paired_median"))),
        _number(row["gflops"]),
        _share(row.get("share_of_gemm")),
        _number(row["gbs"]),
        _share(row.get("share_of_copy")),
        _share(row.get("share_of_limit")),
    ]
    if case["has_memory"]:
        peak = row["peak_extra_bytes"]
        cells.append("-" if peak is None else f"{peak / 2**20:.0f}")
    counts = row.get("counts") or {}
    redone = f", {counts['redone']} of {counts['codes']} redone" if "redone" in counts else ""
    return [*cells, row.get("error", {}).get("text", "-") + redone]


def _titles(case: Mapping[str, Any]) -> list[str]:
    pace = "us/frame" if case["per_frame"] else "x real"
    titles = [name.format(pace=pace) for name in _COLUMNS]
    return [*titles, *(["MiB"] if case["has_memory"] else []), "error"]


def _prepared(case: Mapping[str, Any], per_frame: bool) -> dict[str, Any]:
    has_memory = any(row["peak_extra_bytes"] is not None for row in case["sides"])
    return {**case, "per_frame": per_frame, "has_memory": has_memory}


def _caption(case: Mapping[str, Any]) -> str:
    return f"{case['case']}: {_number(case['flops'] / 1e9)} GFLOP, {_number(case['audio_s'])} s of audio"


def table_lines(case: Mapping[str, Any], per_frame: bool = False) -> list[str]:
    """A case as lines of equal columns. A side that was not timed takes its line for the reason."""
    case = _prepared(case, per_frame)
    titles = _titles(case)
    body = [_cells(case, row) for row in case["sides"]]
    full = [cells for cells in [titles, *body] if len(cells) == len(titles)]
    widths = [max(len(cells[i]) for cells in full) for i in range(len(titles))]
    widths[0] = max(widths[0], *(len(cells[0]) for cells in body)) if body else widths[0]

    def line(cells: Sequence[str]) -> str:
        if len(cells) != len(titles):
            return f"  {cells[0]:<{widths[0]}}  {cells[1]}"
        rest = (f"{cell:>{width}}" for cell, width in zip(cells[1:-1], widths[1:-1], strict=True))
        return "  " + "  ".join([f"{cells[0]:<{widths[0]}}", *rest, cells[-1]]).rstrip()

    return [_caption(case), line(titles), *(line(cells) for cells in body)]


def markdown(run: Mapping[str, Any]) -> str:
    """The whole run as a page."""
    lines = [f"`{run['command']}`, {run['started']}", ""]
    lines += [f"{text}  " for text in header_lines(run)]
    for case in run["cases"]:
        case = _prepared(case, run["what"] == "ops")
        titles = _titles(case)
        lines += [
            "",
            f"**{_caption(case)}**",
            "",
            "| " + " | ".join(titles) + " |",
            "|" + "---|" * len(titles),
        ]
        for row in case["sides"]:
            cells = _cells(case, row)
            cells += [""] * (len(titles) - len(cells))
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, "", LEGEND, ""])


LEGEND = (
    "/ours, paired: how many times as long the side takes as ours (ratio of medians, median of the rounds' "
    "ratios). gemm, copy, limit: share of the measured small-GEMM rate, of the copy rate for this working "
    "set, and of the direct limit (the longer of arithmetic at that GEMM rate, on a CPU as it was in the same rounds, "
    "and traffic at that copy rate). "
    "error: against float64, largest error over largest value and RMS over RMS, or the share of equal codes."
)
