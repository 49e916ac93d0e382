"""`python -m bench.readme`: measured numbers of README and docs/streaming.md, from bench/results, between markers.

`--check` writes nothing and exits with 1 where a page and results differ.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .chart import label_of
from .goals import GOALS
from .gpu_kernels import CALLS
from .lookahead import told as table_of_lookahead

_ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- measured: python -m bench.readme -->", "<!-- end of measured -->"
AMX = "<!-- with AMX: python -m bench.readme -->", "<!-- end of with AMX -->"
AVX2 = "<!-- with AVX2: python -m bench.readme -->", "<!-- end of with AVX2 -->"
SERVED = "<!-- served: python -m bench.readme -->", "<!-- end of served -->"
GPU = "<!-- on a GPU: python -m bench.readme -->", "<!-- end of on a GPU -->"
AHEAD = "<!-- look-ahead: python -m bench.readme -->", "<!-- end of look-ahead -->"
LONG = "<!-- long: python -m bench.readme -->", "<!-- end of long -->"
HEARD = "<!-- heard: python -m bench.readme -->", "<!-- end of heard -->"


def load(folder: Path, kind: str = "cpu") -> list[dict[str, Any]]:
    """The runs on a CPU that lie in a folder; kind: what the names of their files begin with."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"{kind}-*.json"))]


def _model(case: Mapping[str, Any]) -> str:
    words = case["case"].split()
    return str(case.get("model") or words[0 if words[0][0].isdigit() else 1])


def _timed(case: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return sorted((row for row in case["sides"] if row["status"] == "timed"), key=lambda row: row["p50_s"])


def _name(row: Mapping[str, Any]) -> str:
    label = label_of(row)
    return f"**{label}**" if row["ours"] else label


def _times(row: Mapping[str, Any]) -> str:
    faster = row.get("ours_is_faster")
    return "-" if faster is None else f"{faster['of_medians']:.2f}"


def _share(row: Mapping[str, Any]) -> str:
    share = row.get("share_of_limit")
    return "-" if share is None else f"{100 * share:.0f} %"


def _table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (titles, ["---"] * len(titles), *lines)]


def _codec(run: Mapping[str, Any], case: Mapping[str, Any]) -> Iterator[str]:
    dtype = {"float32": "fp32", "bfloat16": "bf16"}[run["dtype"]]
    what = "encode with w2v-BERT" if run["what"] == "inference" else run["what"]
    titles = [f"{what}, {_model(case)}, {dtype}", "x real time", "time, ours = 1", "of the direct limit"]
    lines = [[_name(row), f"{row['times_real_time']:.1f}", _times(row), _share(row)] for row in _timed(case)]
    yield from _table(titles, lines)


def _searches(run: Mapping[str, Any]) -> Iterator[str]:
    lines = []
    for case in run["cases"]:
        if "rvq_search" not in case["case"]:
            continue
        by_side = {row["side"]: f"{row['frame_us']:.2g}" for row in _timed(case)}
        shape = " ".join(case["case"].split()[2:])
        lines.append(
            [f"{_model(case)} {shape}", *(by_side.get(side, "-") for side in ("dualcodec_ext", "faiss", "eager"))]
        )
    titles = ["rvq_search, microseconds per frame", "**dualcodec_ext**", "faiss-cpu, stage by stage", "PyTorch eager"]
    yield from _table(titles, lines) if lines else ()


def _stream(run: Mapping[str, Any]) -> Iterator[str]:
    case = run["cases"][0]
    ours, read = case["sides"]
    titles = [f"frame after frame, {case['model']}, batch {run['batch']}", "median", "p99", "one read of the weights"]
    cells = [
        f"**{'one frame' if run['batch'] == 1 else 'a frame of each'}, {case['frame_s'] * 1e3:.0f} ms of speech**",
        *(f"{ours[k] * 1e3:.1f} ms" for k in ("p50_s", "p99_s")),
    ]
    yield from _table(titles, [[*cells, f"{read['p50_s'] * 1e3:.1f} ms"]])


def _vectors(isa: Sequence[str]) -> str:
    if "avx512f" not in isa:
        return "AVX2"
    return "AVX-512 and AMX" if "amx_bf16" in isa else "AVX-512"


def section(runs: Sequence[Mapping[str, Any]]) -> str:
    """What stands between the markers: where it was measured, then a table per model and way, the decodes first."""
    machines = sorted(
        {
            f"{run['threads']} threads of an {run['machine']['cpu']} ({run['machine']['cores']} cores, "
            f"{_vectors(run['machine']['isa'])}), torch "
            f"{run['machine']['torch']}, commit {(run['commit'] or '?')[:9]}"
            for run in runs
        }
    )
    lines = [f"{text}  " for text in machines]
    order = {"decode": 0, "encode": 1, "inference": 2, "ops": 3, "stream": 4}
    for run in sorted(runs, key=lambda r: (order[r["what"]], r["dtype"] != "float32", r["command"])):
        special = {"ops": _searches, "stream": _stream}.get(run["what"])
        parts = [list(special(run))] if special else [list(_codec(run, case)) for case in run["cases"]]
        for part in parts:
            lines += ["", *part] if part else []
    return "\n".join(lines) + "\n"


def heard(results: Mapping[str, Any]) -> str:
    """How speech comes back from `tiny`, of what `bench.quality` found."""
    clips = ", ".join(f"{name} ({seconds:.1f} s)" for name, seconds in results["clips"].items())
    lines = [f"Means over recordings that nothing was trained on or chosen by: {clips}.", ""]
    rows = [[count, f"{row['stoi']:.3f}", f"{row['pesq']:.2f}"] for count, row in results["scores"].items()]
    lines += _table(["codebooks", "STOI", "PESQ, wide band"], rows)
    falls = [
        f"{name.upper()} from {count} to {count + 1} codebooks"
        for name in ("stoi", "pesq")
        for count in range(1, len(rows))
        if results["scores"][str(count + 1)][name] < results["scores"][str(count)][name]
    ]
    lines += ["", f"Scores rise with each codebook but for {', '.join(falls)}." if falls else "Scores rise with each."]
    if "validation" in results:
        ours = results["validation"]["scores"]
        first, second, last = ours["1"], ours["2"], ours[str(len(rows))]
        clips, seconds = results["validation"]["clips"], results["validation"]["seconds"]
        lines[-1] += (
            f" Over {clips} stretches of {seconds} s of the validation split STOI goes from {first['stoi']:.3f} over"
            f" {second['stoi']:.3f} to {last['stoi']:.3f}, PESQ from {first['pesq']:.2f} over {second['pesq']:.2f} to"
            f" {last['pesq']:.2f}."
        )
    shares = ", ".join(f"{100 * share:.0f}" for share in results["codebook_use"])
    lines += ["", f"Of each codebook's entries {shares} % occur in {results['frames']} frames of held-out speech."]
    parity = results["against_float64"]
    unclear = parity["below_margin_bound"]
    lines += [
        f"Of {parity['codes']} codes of these clips {parity['equal']} are the float64 model's, given the same features;"
        f" the margins of {unclear} ({100 * unclear / parity['codes']:.2f} %) are so small that the rounding of a"
        f" float32 encoder might turn them. Of {parity['frames']} frames"
        f" {parity['frames_below_margin_bound']} ({100 * parity['frames_below_margin_bound'] / parity['frames']:.1f} %)"
        " hold such a code."
    ]
    return "\n".join(lines) + "\n"


def served(run: Mapping[str, Any]) -> str:
    """What `bench.serve` found with many clients."""
    machine, commit = run["machine"], (run["commit"] or "?")[:9]
    lines = [
        f"Clients in real time, messages of {run['piece_ms']:.0f} ms, clips of {run['clip_s']:g} s, a playback that"
        f" begins with {run['preroll_ms']:g} ms in its buffer; server and clients share {machine['cores']} cores of an"
        f" {machine['cpu']}, commit {commit}:",
        "",
    ]
    rows = []
    for case in run["cases"]:
        first, latency = (
            " / ".join(f"{1e3 * case[key][p]:.0f}" for p in ("p50", "p95", "p99")) for key in ("first_s", "latency_s")
        )
        rows.append(
            [
                case["task"],
                str(case["clients"]),
                first,
                latency,
                f"{case['underruns']} in {case['clips']} clips" if case["underruns"] else "none",
                f"{100 * case['server_cpus']:.0f} %",
            ]
        )
    titles = ["tiny", "clients", "first audio, ms: p50 / p95 / p99", "latency, ms", "underruns", "server, of one core"]
    most = {}
    for task in dict.fromkeys(case["task"] for case in run["cases"]):
        cases = [case for case in run["cases"] if case["task"] == task]
        dry = [case["clients"] for case in cases if case["underruns"]]
        most[task] = max((case["clients"] for case in cases if case["clients"] < min(dry, default=1 << 30)), default=0)
    enough = ", ".join(f"{clients} in {task}" for task, clients in most.items())
    return "\n".join([*lines, *_table(titles, rows), "", f"The most clients without an underrun: {enough}."]) + "\n"


def on_a_gpu(runs: Sequence[Mapping[str, Any]]) -> str:
    """The newest times of `bench.gpu_kernels`' calls, those with a goal beside it."""
    limits = {
        (goal.case["what"], goal.case["batch"], goal.case.get("item_frames", 1)): goal.limit_s
        for goal in GOALS
        if "batch" in goal.case
    }
    rows = []
    for name, (batch, frames) in CALLS.items():
        run = next((run for run in reversed(runs) if name in run["calls"]), None)
        if run is None:
            continue
        what = {"e": "encode", "s": "stream"}.get(name[0], "decode")
        audio = "a frame of 80 ms" if frames == 1 else f"{frames * 0.08:.0f} s"
        limit = limits.get((what, batch, frames))
        rows.append(
            [
                f"{what}, {batch} x {audio}" + (" of 12hz_causal" if what == "stream" else ""),
                f"{run['calls'][name]['median_ms']:.2f} ms",
                "-" if limit is None else f"{limit * 1e3:g} ms",
                run["gpu"],
                run["commit"],
            ]
        )
    where = f"torch {runs[-1]['torch']}, 12hz_v1, bfloat16, random weights, CUDA graphs, medians; goals are an H100's:"
    return "\n".join([where, "", *_table(["call", "measured", "goal", "GPU", "commit"], rows)]) + "\n"


def of_hours(run: Mapping[str, Any]) -> str:
    """What `bench.long` found."""
    machine, commit = run["machine"], (run["commit"] or "?")[:9]
    weights, base = sum(run["weight_bytes"].values()), run["base"]["peak_bytes"]
    rows = []
    for name in ("encode", "decode"):
        for case in run["cases"]:
            facts = case[name]
            sizes = (f"{facts[key] / 1e6:.0f} MB" for key in ("peak_bytes", "beyond_weights_bytes", "own_bytes"))
            rows.append([name, f"{case['minutes']:g} min", *sizes])
    titles = [run["model"], "recording", "peak of the process", "beyond the weights", "beyond torch and the package"]
    where = (
        f"{run['threads']} threads of an {machine['cpu']} ({machine['cores']} cores), torch {machine['torch']}, commit"
        f" {commit}. The weights take {weights / 1e6:.0f} MB, packed ones among them; a process that imports torch and"
        f" the package and does nothing takes {base / 1e6:.0f} MB (10^6 bytes)."
    )
    return "\n".join([where, "", *_table(titles, rows)]) + "\n"


def ahead(run: Mapping[str, Any]) -> str:
    """What `bench.lookahead` found."""
    machine, commit = run["machine"], (run["commit"] or "?")[:9]
    where = (
        f"Of {run['seconds']:g} s in {run['dtype']}, {run['weights']} weights, on an {machine['cpu']}"
        f" ({machine['cores']} cores), torch {machine['torch']}, commit {commit}:"
    )
    return "\n".join([where, "", *map(table_of_lookahead, run["cases"])])


def replaced(page: str, text: str, begin: str = BEGIN, end: str = END) -> str:
    """A page with another text between its markers."""
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"the page must hold {begin} and {end} once each")
    before, rest = page.split(begin)
    return f"{before}{begin}\n\n{text}\n{end}{rest.split(end)[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description="The pages' measured numbers.")
    parser.add_argument("--results", default=str(_ROOT / "bench" / "results"), help="folder of the runs")
    parser.add_argument("--readme", default=str(_ROOT / "README.md"))
    parser.add_argument("--streaming", default=str(_ROOT / "docs" / "streaming.md"))
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where they differ")
    args = parser.parse_args(argv)
    results = Path(args.results)

    def read(name: str) -> Any:
        return json.loads((results / name).read_text(encoding="utf-8"))

    parts = {
        args.readme: [
            (section(load(results)), (BEGIN, END)),
            (section(load(results, "amx")), AMX),
            (section(load(results, "avx2")), AVX2),
            (heard(read("quality_tiny.json")), HEARD),
            (served(read("serve-tiny.json")), SERVED),
            (of_hours(read("long-tiny.json")), LONG),
            (on_a_gpu(read("gpu-kernels.json")), GPU),
        ],
        args.streaming: [(ahead(read("lookahead-random.json")), AHEAD)],
    }
    differ = False
    for path, texts in parts.items():
        page = wanted = Path(path).read_text(encoding="utf-8")
        for text, markers in texts:
            wanted = replaced(wanted, text, *markers)
        differ = differ or page != wanted
        if not args.check:
            Path(path).write_text(wanted, encoding="utf-8")
    return 1 if args.check and differ else 0


if __name__ == "__main__":
    sys.exit(main())
