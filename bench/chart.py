"""`python -m bench.chart bench/results/cpu-*.json --out docs/cpu-speed.png`: decode's speed beside its peers'."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LABELS = {
    "dualcodec_ext": "dualcodec_ext",
    "dualcodec_ext fast": "dualcodec_ext, fast",
    "pypi": "PyPI package",
    "reference": "our plain reference, eager",
    "folded": "eager, folded",
    "folded2d": "eager, Conv2d form",
    "compile": "torch.compile",
    "frozen2d": "torch.compile, Conv2d form, frozen",
    "ort1d": "ONNX Runtime",
    "ort2d": "ONNX Runtime, Conv2d form",
    "openvino1d": "OpenVINO",
    "openvino2d": "OpenVINO, Conv2d form",
    "zentorch2d": "zentorch, Conv2d form, frozen",
}
_SUFFIXES = {"float32": "", "bfloat16": ", bf16"}


def label_of(row: Mapping[str, Any]) -> str:
    """What a side of a run is called in tables and charts."""
    side, dtype = row["side"].removesuffix("-bf16").removesuffix(" bf16"), row["dtype"]
    return _LABELS.get(side, side) + _SUFFIXES.get(dtype, f", {dtype}")


@dataclass(frozen=True)
class Bar:
    label: str
    times_real_time: float
    ours: bool
    bf16: bool


@dataclass(frozen=True)
class Panel:
    """One model: its bars, the slowest first, and the direct limits in times real time by dtype."""

    model: str
    bars: tuple[Bar, ...]
    limits: Mapping[str, float]


def panels(runs: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """A panel per model that decode was measured on; a side that several runs timed is taken from the newest."""
    bars: dict[str, dict[str, Bar]] = {}
    limits: dict[str, dict[str, float]] = {}
    for run in sorted(runs, key=lambda r: r["started"]):
        if run["what"] != "decode" or run["device"] != "cpu":
            continue
        for case in run["cases"]:
            model = case["model"] if "model" in case else case["case"].split()[1]
            for row in case["sides"]:
                if row["status"] != "timed":
                    continue
                dtype, label = row["dtype"], label_of(row)
                bar = Bar(label, row["times_real_time"], row["ours"], dtype != "float32")
                bars.setdefault(model, {})[label] = bar
                if row["ours"] and not row["side"].endswith("fast") and row.get("share_of_limit"):
                    limits.setdefault(model, {})[dtype] = row["times_real_time"] / row["share_of_limit"]
    return [
        Panel(model, tuple(sorted(found.values(), key=lambda b: b.times_real_time)), limits.get(model, {}))
        for model, found in sorted(bars.items())
    ]


def draw(runs: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Draw the panels into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = panels(runs)
    if not found:
        raise ValueError("no run of decode on a CPU with a timed side")
    heights = [len(panel.bars) for panel in found]
    figure = Figure(figsize=(9, 1.4 + 0.3 * sum(heights) + 0.7 * len(found)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(
        figure.subplots(len(found), 1, squeeze=False, height_ratios=heights)[:, 0], found, strict=True
    ):
        colours = [("#c2410c" if bar.bf16 else "#ea7a3f") if bar.ours else "#9aa5b1" for bar in panel.bars]
        drawn = axes.barh([b.label for b in panel.bars], [b.times_real_time for b in panel.bars], color=colours)
        axes.bar_label(drawn, fmt="%.1f", padding=3, fontsize=8)
        for dtype, limit in panel.limits.items():
            style = "--" if dtype == "float32" else ":"
            axes.axvline(limit, color="#1f2933", linestyle=style, linewidth=1)
            axes.text(
                limit, 1.0, f" direct limit, {dtype}", transform=axes.get_xaxis_transform(), fontsize=8, va="bottom"
            )
        axes.set_xlim(0, 1.12 * max(*panel.limits.values(), *(bar.times_real_time for bar in panel.bars)))
        axes.set_title(f"decode, {panel.model}", loc="left", fontsize=10, pad=16)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("seconds of audio per second", fontsize=8)
    run = max((r for r in runs if r["what"] == "decode"), key=lambda r: r["started"])
    where = f"{run['machine']['cpu']}, {run['threads']} threads, torch {run['machine']['torch']}"
    figure.suptitle(f"{where}, {run['seconds']:g} s of audio, commit {(run['commit'] or '?')[:9]}", fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.chart", description="A chart of decode on a CPU.")
    parser.add_argument("runs", nargs="+", help="JSON files of python -m bench")
    parser.add_argument("--out", required=True, help="the PNG to write")
    args = parser.parse_args(argv)
    try:
        draw([json.loads(Path(name).read_text(encoding="utf-8")) for name in args.runs], Path(args.out))
    except ImportError:
        parser.error("matplotlib is needed: pip install matplotlib")
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"no chart: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
