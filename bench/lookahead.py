"""`python -m bench lookahead`: the error of a streamed decoder that looks less far ahead than its layers need."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch

import dualcodec_ext as dx
from dualcodec_ext import testing

from . import apart

_PRESETS = ("12hz_v1", "25hz_v1", "12hz_lookahead")


@torch.inference_mode()
def measure(preset: str, seconds: float) -> list[tuple[int, float, float, float]]:
    """Return (frames of look-ahead, latency in ms, error in dB of the signal, largest error) for each choice."""
    config = dx.DualCodecConfig.preset(preset)
    model = dx.accelerate(testing.seeded_model(config.to_dict()))
    frames = math.ceil(seconds * config.frame_rate_hz)
    generator = torch.Generator().manual_seed(1)
    semantic = torch.randint(config.semantic_codebook_size, (1, 1, frames), generator=generator)
    acoustic = torch.randint(config.codebook_size, (1, config.n_codebooks, frames), generator=generator)
    exact = dx.StreamingDecoder(model)
    whole = torch.cat([exact.step(semantic, acoustic), exact.flush()], -1).double()
    found = []
    for k in range(exact.lookahead_frames + 1):
        decoder = dx.StreamingDecoder(model, lookahead=k)
        audio = torch.cat([decoder.step(semantic, acoustic), decoder.flush()], -1)
        error = audio[..., : whole.shape[2]].double() - whole  # with k = 0 there are a few samples more
        relative = float(error.square().mean() / whole.square().mean())
        decibels = 10 * math.log10(relative) if relative else -math.inf
        found.append((k, 1e3 * k / config.frame_rate_hz, decibels, float(error.abs().max() / whole.abs().max())))
    return found


def told(preset: str, rows: Sequence[tuple[int, float, float, float]]) -> str:
    """A Markdown table."""
    lines = [f"| {preset}: `lookahead` | latency, ms | error, dB of the signal | largest error, of the peak |"]
    lines.append("| --- | --- | --- | --- |")
    for k, latency_ms, decibels, largest in rows:
        text = "exact" if decibels == -math.inf else f"{decibels:.1f}"
        lines.append(f"| {k} | {latency_ms:.0f} | {text} | {largest:.2g} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    """Run it; returns 0, or 1 where the compiled module is missing."""
    parser = argparse.ArgumentParser(prog="python -m bench lookahead", description=__doc__)
    parser.add_argument("--preset", default=",".join(_PRESETS), help="some, separated by commas")
    parser.add_argument("--seconds", type=float, default=4.0, help="of audio (4)")
    parser.add_argument("--markdown", metavar="F", help="write what is printed")
    args = parser.parse_args(argv)
    presets = args.preset.split(",")
    for preset in presets:
        if preset not in dx.DualCodecConfig.presets():
            parser.error(f"--preset must name some of {', '.join(dx.DualCodecConfig.presets())}, got {preset}")
    if apart.refuse():
        return 1
    text = "\n".join(told(preset, measure(preset, args.seconds)) for preset in presets)
    print(text)
    if args.markdown:
        Path(args.markdown).write_text(text, encoding="utf-8")
    return 0
