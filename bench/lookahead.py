"""`python -m bench lookahead`: the error of a streamed decoder that looks less far ahead than its layers need."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import dualcodec_ext as dx
from dualcodec_ext import testing

from . import apart

_PRESETS = ("12hz_v1", "25hz_v1", "12hz_lookahead")


@torch.inference_mode()
def measure(preset: str, seconds: float) -> dict[str, Any]:
    """Return a preset's case: for each choice of look-ahead its latency and its error against the exact stream."""
    config = dx.DualCodecConfig.preset(preset)
    model = dx.accelerate(testing.seeded_model(config.to_dict()))
    frames = math.ceil(seconds * config.frame_rate_hz)
    generator = torch.Generator().manual_seed(1)
    semantic = torch.randint(config.semantic_codebook_size, (1, 1, frames), generator=generator)
    acoustic = torch.randint(config.codebook_size, (1, config.n_codebooks, frames), generator=generator)
    exact = dx.StreamingDecoder(model)
    whole = torch.cat([exact.step(semantic, acoustic), exact.flush()], -1).double()
    rows = []
    for k in range(exact.lookahead_frames + 1):
        decoder = dx.StreamingDecoder(model, lookahead=k)
        audio = torch.cat([decoder.step(semantic, acoustic), decoder.flush()], -1)
        error = audio[..., : whole.shape[2]].double() - whole  # with k = 0 there are a few samples more
        relative = float(error.square().mean() / whole.square().mean())
        rows.append(
            {
                "lookahead": k,
                "latency_s": k / config.frame_rate_hz,
                "error_db": 10 * math.log10(relative) if relative else None,  # of the signal; None: no error
                "largest_error": float(error.abs().max() / whole.abs().max()),  # of the peak
            }
        )
    return {"model": preset, "frames": frames, "rows": rows}


def told(case: Mapping[str, Any]) -> str:
    """A Markdown table."""
    lines = [f"| {case['model']}: `lookahead` | latency, ms | error, dB of the signal | largest error, of the peak |"]
    lines.append("| --- | --- | --- | --- |")
    for row in case["rows"]:
        error = "exact" if row["error_db"] is None else f"{row['error_db']:.1f}"
        latency_ms, largest = 1e3 * row["latency_s"], row["largest_error"]
        lines.append(f"| {row['lookahead']} | {latency_ms:.0f} | {error} | {largest:.2g} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    """Run it; returns 0, or 1 where the compiled module is missing."""
    parser = argparse.ArgumentParser(prog="python -m bench lookahead", description=__doc__)
    parser.add_argument("--preset", default=",".join(_PRESETS), help="some, separated by commas")
    parser.add_argument("--seconds", type=float, default=4.0, help="of audio (4)")
    parser.add_argument("--json", metavar="F", help="write everything")
    parser.add_argument("--markdown", metavar="F", help="write what is printed")
    args = parser.parse_args(argv)
    presets = args.preset.split(",")
    for preset in presets:
        if preset not in dx.DualCodecConfig.presets():
            parser.error(f"--preset must name some of {', '.join(dx.DualCodecConfig.presets())}, got {preset}")
    if apart.refuse():
        return 1
    run = apart.begun("lookahead", argv) | {"dtype": "float32", "weights": "random", "seconds": args.seconds}
    run["cases"] = [measure(preset, args.seconds) for preset in presets]
    apart.finish(run, args.json)
    text = "\n".join(map(told, run["cases"]))
    print(text)
    if args.markdown:
        Path(args.markdown).write_text(text, encoding="utf-8")
    return 0
