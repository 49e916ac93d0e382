"""`python -m bench stream`: one frame after another through a decoder, as live speech has it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import dualcodec_ext as dx
from dualcodec_ext import testing
from dualcodec_ext._stream_graph import GraphDecoder

from . import apart
from .gpu_timing import synchronize
from .timing import percentile
from .workload import load_settings

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
READ = "one read of the weights"
REPLAY = "the replay alone"
_WARM = 20  # frames that are not timed
_IN_A_ROW = 20  # replays of a sample


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench stream", description="Time one decoded frame after another.")
    parser.add_argument("--preset", default="12hz_causal")
    parser.add_argument("--config", help="a JSON file with the settings of a codec, instead of a preset")
    parser.add_argument("--frames", type=int, default=300, help="that are timed (300), after 20 that are not")
    parser.add_argument("--batch", type=int, default=1, help="streams side by side (1)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="float32")
    parser.add_argument("--json", metavar="F", help="write everything, all samples included")
    parser.add_argument("--markdown", metavar="F", help="write what is printed")
    args = parser.parse_args(argv)
    for name in ("frames", "batch", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    try:
        args.name, args.settings = load_settings(args.preset, args.config)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    return args


def replays(decoder: dx.StreamingDecoder, count: int) -> list[float]:
    """Seconds of replays of the last step's pass one behind the other, by the GPU's clock."""
    passes = decoder._run
    assert isinstance(passes, GraphDecoder)
    replay = next(reversed(passes._recorded._made.values())).replay
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    samples_s = []
    for _ in range(count):
        begin.record()
        for _ in range(_IN_A_ROW):
            replay()
        end.record()
        end.synchronize()
        samples_s.append(begin.elapsed_time(end) / _IN_A_ROW * 1e-3)
    return samples_s


@torch.inference_mode()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds per frame as a caller sees them, and in turn those of reading as many bytes as the weights have.

    On a GPU a step begins with codes that lie there and ends when its audio does; its replays are timed behind them.
    """
    model = dx.accelerate(testing.seeded_model(args.settings).to(args.device), dtype=_DTYPES[args.dtype])
    decoder = dx.StreamingDecoder(model, args.batch)
    cfg, frames = model.settings, args.frames + _WARM
    generator = torch.Generator().manual_seed(1)
    semantic = torch.randint(cfg["semantic_codebook_size"], (args.batch, 1, frames), generator=generator)
    shape = (args.batch, cfg["n_codebooks"], frames)
    acoustic = torch.randint(cfg["codebook_size"], shape, generator=generator)
    semantic, acoustic = semantic.to(args.device), acoustic.to(args.device)
    hop, weights = model.dac.hop_length, decoder.weight_bytes()
    source = torch.ones(weights // 4, device=args.device)
    out = torch.empty(args.batch, 1, hop, dtype=_DTYPES[args.dtype], device=args.device)
    samples_s, reads_s = [], []
    for f in range(frames):
        codes = semantic[:, :, f : f + 1], acoustic[:, :, f : f + 1]
        synchronize(args.device)
        start = time.perf_counter()
        decoder.step(*codes, out=out)
        synchronize(args.device)
        between = time.perf_counter()
        source.sum()
        synchronize(args.device)
        samples_s.append(between - start)
        reads_s.append(time.perf_counter() - between)
    kept = samples_s[_WARM:]
    read_s = percentile(reads_s[_WARM:], 50)
    read_gbs = weights / read_s / 1e9
    frame_s = hop / cfg["sample_rate"]
    ours = {"side": "dualcodec_ext", "ours": True, "p50_s": percentile(kept, 50), "p99_s": percentile(kept, 99)}
    ours |= {"samples_s": kept, "peak_extra_bytes": None}
    # What the machine itself does to one step in a hundred shows in the reads too.
    read = {"side": READ, "ours": False, "p50_s": read_s, "p99_s": percentile(reads_s[_WARM:], 99)}
    read |= {"bytes": weights, "gbs": read_gbs}
    found = [ours, read]
    if args.device == "cuda":
        alone = replays(decoder, max(3, args.frames // _IN_A_ROW))
        found.append({"side": REPLAY, "ours": False, "p50_s": percentile(alone, 50), "p99_s": percentile(alone, 99)})
    sides = [
        row | {"status": "timed", "dtype": args.dtype, "times_real_time": args.batch * frame_s / row["p50_s"]}
        for row in found
    ]
    case = {"case": f"stream {args.name}", "model": args.name, "frame_s": frame_s, "state_bytes": decoder.state_bytes()}
    return {
        "device": args.device,
        "dtype": args.dtype,
        "threads": args.threads,
        "batch": args.batch,
        "cases": [case | {"sides": sides}],
    }


def told(run: Mapping[str, Any]) -> str:
    """One line of a run."""
    case = run["cases"][0]
    ours, read, *replay = case["sides"]
    if replay:
        return (
            f"{case['model']} {run['dtype']} B={run['batch']} on a GPU, frames of {case['frame_s'] * 1e3:.0f} ms: p50"
            f" {ours['p50_s'] * 1e6:.0f} us, p99 {ours['p99_s'] * 1e6:.0f} us; the replay alone"
            f" {replay[0]['p50_s'] * 1e6:.0f} us; reading {read['bytes'] / 2**20:.0f} MiB of weights"
            f" {read['p50_s'] * 1e6:.0f} us; state and rows {case['state_bytes'] / 2**20:.1f} MiB"
        )
    p50, p99 = (f"{ours[key] * 1e3:.2f} ms ({ours[key] / read['p50_s']:.2f}x)" for key in ("p50_s", "p99_s"))
    return (
        f"{case['model']} {run['dtype']} B={run['batch']} {run['threads']} threads, frames of"
        f" {case['frame_s'] * 1e3:.0f} ms: p50 {p50}, p99 {p99} of {read['p50_s'] * 1e3:.2f} ms (its own p99"
        f" {read['p99_s'] / read['p50_s']:.2f}x) for reading"
        f" {read['bytes'] / 2**20:.0f} MiB of weights at {read['gbs']:.1f} GB/s; state"
        f" {case['state_bytes'] / 2**20:.1f} MiB"
    )


def main(argv: Sequence[str]) -> int:
    """Run it; returns 0, or 1 where the compiled module is missing."""
    args = parse(argv)
    if apart.refuse():
        return 1
    if args.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no GPU, so nothing is measured on one.")
        return 1
    torch.set_num_threads(args.threads)
    begun = apart.begun("stream", ["--preset", args.name, "--batch", str(args.batch), "--device", args.device])
    run = apart.finish(begun | measure(args), args.json)
    print(told(run))
    if args.markdown:
        Path(args.markdown).write_text(f"{told(run)}, commit {run['commit']}\n", encoding="utf-8")
    return 0
