"""`python -m bench long`: how much memory the command line takes over a long recording, measured from outside."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import dualcodec_ext as dx
from dualcodec_ext import testing

from . import apart, machine
from .workload import load_settings

_POINTS = 400  # of a curve, in the file
# A process that imports what every command does, waits until it has been looked at, and does nothing.
_IDLE = "import sys, time, torch, dualcodec_ext; time.sleep(float(sys.argv[1])); print('{\"results\": []}')"
_RATE_HZ = 24000


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench long",
        description="Encode and decode recordings through the command line, each in a process of its own, and watch "
        "its resident memory, and that of a process that imports torch and the package alone. Weights are random "
        "(tiny: its own), features log-mel: w2v-BERT's memory is apart.",
    )
    parser.add_argument("--minutes", type=float, nargs="+", default=[180.0], help="lengths of the recordings (180)")
    parser.add_argument("--preset", default="12hz_v1")
    parser.add_argument("--config", help="a JSON file with the settings of a codec, instead of a preset")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--fast", action="store_true", help="decode on the fast path")
    parser.add_argument("--interval", type=float, default=0.25, help="seconds between two looks (0.25)")
    parser.add_argument("--json", metavar="F", help="write everything")
    parser.add_argument("--png", metavar="F", help="draw the curves (needs matplotlib)")
    args = parser.parse_args(argv)
    if min(args.minutes) <= 0 or args.threads < 1 or args.interval <= 0:
        parser.error("--minutes, --threads and --interval must be above 0")
    try:
        args.name, args.settings = load_settings(args.preset, args.config)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    return args


def make_recording(path: Path, minutes: float) -> None:
    """Write speech-like sound, no two stretches of which are alike: one minute of it, mixed with itself elsewhere."""
    import soundfile

    minute = testing.make_speech(60 * _RATE_HZ)[0, 0]
    generator = torch.Generator().manual_seed(0)
    left = round(60 * minutes * _RATE_HZ)
    with soundfile.SoundFile(path, "w", _RATE_HZ, 1) as file:
        while left > 0:
            one, other = (minute.roll(s) for s in torch.randint(len(minute), (2,), generator=generator).tolist())
            block = (0.5 * (one + other))[:left]
            file.write(block.numpy())
            left -= len(block)


def watch(command: Sequence[str], interval_s: float) -> dict[str, Any]:
    """Run a command; returns what it printed as JSON, its peak and its curve of resident memory."""
    start = time.perf_counter()
    curve: list[tuple[float, int]] = []
    peak = 0
    with tempfile.TemporaryFile() as out, subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            facts = machine.memory_of(process.pid)
            if facts is not None:
                curve.append((round(time.perf_counter() - start, 2), facts[0]))
                peak = max(peak, facts[1])
            time.sleep(interval_s)
        elapsed_s = time.perf_counter() - start
        out.seek(0)
        text = out.read().decode()
    if process.returncode:
        raise RuntimeError(f"{shlex.join(command)} ended with {process.returncode}: {text.strip()[-500:]}")
    step = -(-len(curve) // _POINTS) or 1
    return {
        "elapsed_s": elapsed_s,
        "peak_bytes": peak,
        "seconds_and_bytes": curve[::step],
        "printed": json.loads(text)["results"],
    }


def weight_bytes(settings: Mapping[str, Any], fast: bool) -> dict[str, int]:
    """What a loaded model holds: its parameters, and the packed weights that it runs on."""
    from dualcodec_ext.engine import Engine

    model = testing.seeded_model(dict(settings))
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"parameters": parameters, "packed": Engine(model, torch.float32, fast).weight_bytes()}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    weights = weight_bytes(args.settings, args.fast)
    idle = watch([sys.executable, "-c", _IDLE, str(4 * args.interval)], args.interval)
    base = {"elapsed_s": idle["elapsed_s"], "peak_bytes": idle["peak_bytes"]}
    print(f"torch and the package alone: peak {base['peak_bytes'] / 2**20:.0f} MiB", flush=True)
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        model = "tiny"  # with the weights that the package brings
        if args.config or args.preset != "tiny":
            config = Path(folder, f"{args.name}.json")
            config.write_text(json.dumps(dx.DualCodecConfig.from_dict(args.settings).to_dict()))
            model = str(config)
        program = [sys.executable, "-m", "dualcodec_ext"]
        common = ["--threads", str(args.threads), "--json"]
        for minutes in args.minutes:
            source = Path(folder, "recording.wav")
            make_recording(source, minutes)
            case: dict[str, Any] = {"minutes": minutes}
            codes, wave = source.with_suffix(".codes.safetensors"), Path(folder, "out", "recording.wav")
            fast = ["--fast"] if args.fast else []
            for name, command in (
                ("encode", ["encode", str(source), "-o", folder, "--model", model]),
                ("decode", ["decode", str(codes), "-o", str(wave.parent), *fast]),
            ):
                run = watch([*program, *command, *common], args.interval)
                printed = run.pop("printed")[0]
                run["times_real_time"] = 60 * minutes / printed[f"{name}_s"]
                run["beyond_weights_bytes"] = run["peak_bytes"] - sum(weights.values())
                run["own_bytes"] = run["beyond_weights_bytes"] - base["peak_bytes"]
                case[name] = run
                print(told(args.name, minutes, name, run), flush=True)
            for path in (source, codes, wave):
                path.unlink()
            cases.append(case)
    return {
        "model": args.name,
        "settings": args.settings,
        "fast": args.fast,
        "threads": args.threads,
        "weight_bytes": weights,
        "base": base,
        "cases": cases,
    }


def told(model: str, minutes: float, name: str, run: Mapping[str, Any]) -> str:
    """One line of a run."""
    peak, beyond, own = (run[key] / 2**20 for key in ("peak_bytes", "beyond_weights_bytes", "own_bytes"))
    return (
        f"{model} {name} {minutes:g} min: peak {peak:.0f} MiB, {beyond:.0f} MiB beyond the weights, "
        f"{own:.0f} MiB beyond torch and the package too, {run['elapsed_s']:.0f} s, "
        f"{run['times_real_time']:.1f}x real time"
    )


def draw(run: Mapping[str, Any], path: str) -> None:
    """Draw resident memory over time, a panel for encode and one for decode."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    for panel, name in zip(panels, ("encode", "decode"), strict=True):
        for case in run["cases"]:
            seconds, held = zip(*case[name]["seconds_and_bytes"], strict=True)
            whole = case[name]["elapsed_s"]
            panel.plot([100 * s / whole for s in seconds], [b / 2**20 for b in held], label=f"{case['minutes']:g} min")
        panel.axhline(run["base"]["peak_bytes"] / 2**20, color="grey", linestyle="--", label="torch and the package")
        panel.axhline(sum(run["weight_bytes"].values()) / 2**20, color="grey", linestyle=":", label="weights")
        panel.set_title(f"{name}, {run['model']}")
        panel.set_xlabel("% of the run")
        panel.set_ylim(bottom=0)
        panel.legend()
    panels[0].set_ylabel("resident memory, MiB")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str]) -> int:
    """Run it; returns 0, or 1 where the compiled module is missing or memory can't be read."""
    args = parse(argv)
    if apart.refuse():
        return 1
    if machine.memory_of() is None:
        print("Resident memory can't be read on this system.")
        return 1
    run = apart.finish(apart.begun("long", argv) | measure(args), args.json)
    if args.png:
        draw(run, args.png)
    return 0
