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

from . import apart
from .timing import percentile
from .workload import load_settings

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
READ = "one read of the weights"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench stream", description="Time one decoded frame after another.")
    parser.add_argument("--preset", default="12hz_causal")
    parser.add_argument("--config", help="a JSON file with the settings of a codec, instead of a preset")
    parser.add_argument("--frames", type=int, default=300, help="that are timed (300), after 20 that are not")
    parser.add_argument("--batch", type=int, default=1, help="streams side by side (1)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
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


@torch.inference_mode()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds per frame, and in turn with them those of reading as many bytes as the weights have."""
    model = dx.accelerate(testing.seeded_model(args.settings), dtype=_DTYPES[args.dtype])
    decoder = dx.StreamingDecoder(model, args.batch)
    cfg, frames = model.settings, args.frames + 20
    generator = torch.Generator().manual_seed(1)
    semantic = torch.randint(cfg["semantic_codebook_size"], (args.batch, 1, frames), generator=generator)
    shape = (args.batch, cfg["n_codebooks"], frames)
    acoustic = torch.randint(cfg["codebook_size"], shape, generator=generator)
    hop, weights = model.dac.hop_length, decoder.weight_bytes()
    source = torch.ones(weights // 4)
    out = torch.empty(args.batch, 1, hop, dtype=_DTYPES[args.dtype])
    samples_s, reads_s = [], []
    for f in range(frames):
        codes = semantic[:, :, f : f + 1], acoustic[:, :, f : f + 1]
        start = time.perf_counter()
        decoder.step(*codes, out=out)
        between = time.perf_counter()
        source.sum()
        samples_s.append(between - start)
        reads_s.append(time.perf_counter() - between)
    kept = samples_s[20:]
    read_s = percentile(reads_s[20:], 50)
    read_gbs = weights / read_s / 1e9
    frame_s = hop / cfg["sample_rate"]
    ours = {"side": "dualcodec_ext", "ours": True, "p50_s": percentile(kept, 50), "p99_s": percentile(kept, 99)}
    # What the machine itself does to one step in a hundred shows in the reads too.
    read = {"side": READ, "ours": False, "p50_s": read_s, "p99_s": percentile(reads_s[20:], 99)}
    read |= {"bytes": weights, "gbs": read_gbs}
    sides = [
        row | {"status": "timed", "dtype": args.dtype, "times_real_time": args.batch * frame_s / row["p50_s"]}
        for row in (ours | {"samples_s": kept}, read)
    ]
    case = {"case": f"stream {args.name}", "model": args.name, "frame_s": frame_s, "state_bytes": decoder.state_bytes()}
    return {
        "device": "cpu",
        "dtype": args.dtype,
        "threads": args.threads,
        "batch": args.batch,
        "cases": [case | {"sides": sides}],
    }


def told(run: Mapping[str, Any]) -> str:
    """One line of a run."""
    case = run["cases"][0]
    ours, read = case["sides"]
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
    torch.set_num_threads(args.threads)
    begun = apart.begun("stream", ["--preset", args.name, "--batch", str(args.batch)])
    run = apart.finish(begun | measure(args), args.json)
    print(told(run))
    if args.markdown:
        Path(args.markdown).write_text(f"{told(run)}, commit {run['commit']}\n", encoding="utf-8")
    return 0
