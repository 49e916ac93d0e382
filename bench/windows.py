"""`python -m bench windows`: what w2v-BERT's features from overlapping windows change, on its real size.

The weights are random, of the semantic model and of the codec: what is measured is how far a window's edge reaches in a
net of this size and shape that has learnt nothing, and no statement about the released weights.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dualcodec_ext import testing
from dualcodec_ext.engine import Engine
from dualcodec_ext.semantic import W2vBertFeatures

from . import apart
from .workload import load_settings

_LAYERS = 18  # one more than is run, as a checkpoint has


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench windows", description="Features whole and in windows.")
    parser.add_argument("--seconds", type=float, default=90.0, help="of speech-like sound (90)")
    parser.add_argument("--window", type=float, default=30.0, help="seconds of a window (30)")
    parser.add_argument("--overlap", type=float, default=5.0, help="seconds that two windows share (5)")
    parser.add_argument("--preset", default="12hz_v1")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--small", action="store_true", help="a narrow semantic model, to try the command")
    parser.add_argument("--json", metavar="F", help="write everything")
    args = parser.parse_args(argv)
    if args.seconds <= 60 or args.threads < 1:
        parser.error("--seconds must be above 60, up to which nothing is windowed, and --threads above 0")
    args.name, args.settings = load_settings(args.preset, None)
    return args


def save_model(folder: Path, small: bool, channels: int) -> Path:
    """Write w2v-BERT 2.0 with random weights, its feature extractor and statistics; returns the folder."""
    from transformers import SeamlessM4TFeatureExtractor, Wav2Vec2BertConfig, Wav2Vec2BertModel

    torch.manual_seed(0)
    size = {"intermediate_size": 64, "num_attention_heads": 4} if small else {}
    config = Wav2Vec2BertConfig(hidden_size=channels, num_hidden_layers=_LAYERS, **size)
    Wav2Vec2BertModel(config).half().save_pretrained(folder)
    SeamlessM4TFeatureExtractor().save_pretrained(folder)
    return folder


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    audio = testing.make_speech(round(args.seconds * 24000))
    factor = args.settings["semantic_downsample_factor"]
    channels = args.settings["semantic_dim"]
    elapsed = {}
    with tempfile.TemporaryDirectory() as name:
        folder = save_model(Path(name), args.small, channels)
        torch.save({"mean": torch.zeros(channels), "var": torch.ones(channels)}, folder / "statistics.pt")
        options = {"downsample_factor": factor, "autocast": False, "meanvar_fname": "statistics.pt"}
        made = W2vBertFeatures(folder, folder, **options)
        features = {}
        made(audio[..., :48000])  # which loads it
        for form, window in (("whole", None), ("windows", args.window)):
            made.window_s, made.overlap_s = window, args.overlap
            start = time.perf_counter()
            features[form] = made(audio)
            elapsed[form] = time.perf_counter() - start
    whole, windows = features["whole"], features["windows"]
    frames = min(whole.shape[-1], windows.shape[-1])
    engine = Engine(testing.seeded_model(args.settings), torch.float32)
    scale = whole.std()  # random weights: what the codec is given must have the spread of normalised features
    hop = engine.hop_samples
    codes = [
        engine.encode_clips(audio[..., : frames * hop], x[..., :frames] / scale, None, None, None)
        for x in (whole, windows)
    ]
    same = [float((a == b).float().mean()) for a, b in zip(codes[0], codes[1], strict=True)]
    error = (whole[..., :frames] - windows[..., :frames]).square().mean(1).sqrt()[0] / scale
    return {
        "model": args.name,
        "weights": "random, of the semantic model and of the codec",
        "semantic_model": "narrow" if args.small else "w2v-BERT 2.0's size, 17 layers",
        "seconds": args.seconds,
        "window_s": args.window,
        "overlap_s": args.overlap,
        "threads": args.threads,
        "frames": [whole.shape[-1], windows.shape[-1]],
        "semantic_codes_equal": same[0],
        "acoustic_codes_equal": same[1],
        "feature_error_rms": float(error.square().mean().sqrt()),
        "feature_error_rms_by_frame": [round(x, 4) for x in error.tolist()],
        "elapsed_s": elapsed,
    }


def told(run: dict[str, Any]) -> str:
    """One line of a run."""
    return (
        f"{run['model']}, {run['semantic_model']}, random weights, {run['seconds']:g} s in windows of "
        f"{run['window_s']:g} s with {run['overlap_s']:g} s overlap: {100 * run['semantic_codes_equal']:.1f} % of the "
        f"semantic and {100 * run['acoustic_codes_equal']:.1f} % of the acoustic codes are those of the whole clip; "
        f"features differ by {run['feature_error_rms']:.3f} of a standard deviation in RMS; "
        f"{run['elapsed_s']['windows']:.0f} s, whole {run['elapsed_s']['whole']:.0f} s"
    )


def main(argv: Sequence[str]) -> int:
    """Run it; returns 0, or 1 where the compiled module is missing."""
    args = parse(argv)
    if apart.refuse():
        return 1
    torch.set_num_threads(args.threads)
    run = apart.finish(apart.begun("windows", argv) | measure(args), args.json)
    print(told(run))
    return 0
