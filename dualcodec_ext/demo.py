"""`make demo`: a sentence through the codec, checked against the reference and timed beside it."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_ROUNDS = 3
_MOST_SECONDS = 4.0  # the reference takes about as long as the audio lasts, and every round runs it twice


def main(argv: list[str] | None = None) -> int:
    """Run the demo.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit code: 0, or 2 when the result could not be written.
    """
    parser = argparse.ArgumentParser(prog="python -m dualcodec_ext.demo", description=__doc__)
    parser.add_argument("--output", default="demo_out.wav", help="where the decoded speech goes (demo_out.wav)")
    parser.add_argument("--rounds", type=int, default=_ROUNDS, help="timed rounds, both sides in turn")
    parser.add_argument("--model", default="tiny", help="preset; all but tiny are untrained here (tiny)")
    options = parser.parse_args(argv)

    import dualcodec_ext as dx
    from dualcodec_ext._cli.codec import open_codec
    from dualcodec_ext._cli.options import ModelOptions
    from dualcodec_ext._cli.voice import speak
    from dualcodec_ext.audio import write_audio
    from dualcodec_ext.codes import UNTRAINED
    from dualcodec_ext.errors import DualCodecError

    speech, what = speak()
    samples = speech.samples[: round(_MOST_SECONDS * speech.sample_rate_hz)]
    seconds = len(samples) / speech.sample_rate_hz
    print(f"speech: {what}, {seconds:.2f} s")

    try:
        codec = open_codec(ModelOptions(options.model), None)
    except DualCodecError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    config, model = codec.config, codec.model
    parameters = sum(p.numel() for p in model.parameters())
    state = UNTRAINED if codec.untrained else "trained"
    print(f"model: {options.model}, {parameters / 1e6:.1f} million parameters, {state}")
    if dx.build.load_module() is None:
        print(f"compiled module: {dx.build.unavailable_reason()}")

    codes = codec.encode(samples, speech.sample_rate_hz)
    wave, rate_hz = codec.decode(codes)
    semantic = torch.from_numpy(codes.semantic.astype("int64"))[None]
    assert codes.acoustic is not None
    acoustic = torch.from_numpy(codes.acoustic.astype("int64"))[None]
    print(
        f"codes: semantic {list(semantic.shape)}, acoustic {list(acoustic.shape)}, {config.frame_rate_hz:g} frames/s;"
        f" audio: [{len(wave)}] at {rate_hz} Hz"
    )

    with dx.backend("reference"):
        plain = codec.encode(samples, speech.sample_rate_hz)
        plain_wave = model.decode_from_codes(semantic, acoustic)
    assert plain.acoustic is not None
    equal = int((plain.semantic == codes.semantic).sum() + (plain.acoustic == codes.acoustic).sum())
    total = plain.semantic.size + plain.acoustic.size
    apart = (model.decode_from_codes(semantic, acoustic) - plain_wave).abs().max()
    print(f"parity with plain PyTorch: {equal} of {total} codes equal, samples at most {float(apart):.1e} apart")

    audio = torch.nn.functional.pad(torch.zeros(1, 1, 0), (0, semantic.shape[-1] * config.hop_length))
    features = codec.features(audio) if codec.features is not None else audio
    for name, call in (
        ("encode", lambda: model.encode(audio, semantic_repr=features[..., : semantic.shape[-1]])),
        ("decode", lambda: model.decode_from_codes(semantic, acoustic)),
    ):
        ours, theirs = _in_turn(call, options.rounds)
        length = semantic.shape[-1] / config.frame_rate_hz
        print(
            f"{name}: {length / ours:.1f}x real time, plain PyTorch {length / theirs:.1f}x, ratio {theirs / ours:.1f}"
            f" (medians of {options.rounds} rounds in turn, {torch.get_num_threads()} threads)"
        )

    try:
        write_audio(Path(options.output), wave, rate_hz, comment=UNTRAINED if codec.untrained else None)
    except (DualCodecError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.output}: {state}")
    return 0


def _in_turn(call: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Median seconds of a call on the compiled ops and on plain PyTorch, one after the other in every round."""
    import dualcodec_ext as dx

    seconds: tuple[list[float], list[float]] = ([], [])
    call()
    for _ in range(rounds):
        for i, name in enumerate(("auto", "reference")):
            with dx.backend(name):
                start = time.perf_counter()
                call()
                seconds[i].append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


if __name__ == "__main__":
    sys.exit(main())
