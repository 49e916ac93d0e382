"""What `stream` and `serve` do."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dualcodec_ext._cli.codec import Codec, configure_torch, load_config, open_model
from dualcodec_ext._cli.interrupt import FirstInterrupt
from dualcodec_ext._cli.long import finite
from dualcodec_ext._cli.options import DEFAULT_MODEL, ModelOptions
from dualcodec_ext._cli.outputs import files_of, refuse_clashes
from dualcodec_ext._cli.pcm import RawSource, Sink, Source, open_sink, open_source
from dualcodec_ext._cli.report import Report, debugging, one_line
from dualcodec_ext.codes import UNTRAINED
from dualcodec_ext.errors import DualCodecError, need_extra

if TYPE_CHECKING:
    from dualcodec_ext.audio import Samples
    from dualcodec_ext.serving import ServeOptions, Server
    from dualcodec_ext.streaming import StreamingDecoder, StreamingEncoder


class Latency:
    """The time from each frame's last sample in to its last sample out.

    Args:
        hop_samples: of a frame.
    """

    def __init__(self, hop_samples: int) -> None:
        self._hop = hop_samples
        self._heard_s: list[float] = []  # when each frame's last sample came
        self.samples_in = self.samples_out = 0
        self.seconds: list[float] = []

    def came(self, samples: int, now_s: float) -> None:
        """Samples came in."""
        self.samples_in += samples
        self._heard_s += [now_s] * (self.samples_in // self._hop - len(self._heard_s))

    def ended(self, now_s: float) -> None:
        """No more will come, which makes a last frame of what is there."""
        self._heard_s += [now_s] * (-(-self.samples_in // self._hop) - len(self._heard_s))

    def left(self, samples: int, now_s: float) -> None:
        """Samples went out."""
        self.samples_out += samples
        whole = self.samples_out == self.samples_in
        done = len(self._heard_s) if whole else min(self.samples_out // self._hop, len(self._heard_s))
        self.seconds += [now_s - self._heard_s[f] for f in range(len(self.seconds), done)]

    def percentiles_ms(self) -> dict[str, float]:
        """The p50, p95 and p99 of the frames so far; empty without frames."""
        if not self.seconds:
            return {}
        found = np.percentile(self.seconds, (50, 95, 99))
        return {f"p{p}_ms": 1e3 * float(value) for p, value in zip((50, 95, 99), found, strict=True)}


def run_stream(
    source: str,
    target: str,
    options: ModelOptions,
    codebooks: int | None,
    sample_format: str,
    piece_ms: float,
    paced: bool,
    lookahead: int | None,
    as_json: bool,
) -> int:
    """Sends audio through encoder and decoder as it comes.

    Args:
        source, target: files, or - for stdin and stdout.
        options: which model, and how it runs.
        codebooks: to use, the semantic one among them; None for all.
        sample_format: of raw PCM: s16le or f32le.
        piece_ms: audio that is taken in at a time.
        paced: take it in no faster than in real time.
        lookahead: frames that the output may run behind; None: as many as the model needs.
        as_json: print the summary as JSON.
    Returns:
        The exit code.
    Raises:
        DualCodecError: the output is the input, the model can't stream, or the audio can't be read or written.
    """
    from dualcodec_ext.streaming import StreamingDecoder, StreamingEncoder

    name, config = load_config(options.model or DEFAULT_MODEL)
    piece = round(piece_ms * config.sample_rate / 1e3) if 0 < piece_ms < 1e6 else 0
    if piece < 1:
        raise DualCodecError(f"--piece-ms must be a sample's time or more, got {piece_ms:g}")
    if codebooks is not None and codebooks > config.n_codebooks + 1:
        raise DualCodecError(f"--codebooks must be 1 to {config.n_codebooks + 1} for {name}, got {codebooks}")
    # Standard streams may be redirected from and to files.
    named = [Path({"-": device}.get(path, path)) for path, device in ((source, "/dev/stdin"), (target, "/dev/stdout"))]
    refuse_clashes({"--out": named[1]}, {"the input": named[0], **files_of(options)})
    with contextlib.ExitStack() as signals, contextlib.ExitStack() as stack:
        opened = stack.enter_context(open_source(source, sample_format, config.sample_rate))
        codec = _opened(options, Report("stream", as_json=False))
        if codec.model.front_end is None:
            raise DualCodecError(f"{name} computes no features of its own: those of w2v-BERT depend on the whole clip")
        encoder = StreamingEncoder(codec.model, num_quantizers=codebooks)
        decoder = StreamingDecoder(codec.model, lookahead=lookahead)
        if isinstance(opened, RawSource) and opened.live:
            opened.wait = signals.enter_context(FirstInterrupt()).wait
        sink = stack.enter_context(open_sink(target, sample_format, config.sample_rate))
        latency = Latency(config.hop_length)
        gc.freeze()  # or a full collection, which looks through all of torch, would hold a frame up
        begun_s = time.perf_counter()
        _flow(opened, sink, encoder, decoder, latency, piece, config.sample_rate if paced else None)
        elapsed_s = time.perf_counter() - begun_s
    if opened.note:
        print(one_line(opened.note), file=sys.stderr)
    facts = {
        "model": name,
        "samples_in": latency.samples_in,
        "samples_out": latency.samples_out,
        "frames": len(latency.seconds),
        "lookahead_ms": decoder.latency_ms,
        "elapsed_s": elapsed_s,
        "times_real_time": latency.samples_in / config.sample_rate / max(elapsed_s, 1e-9),
        **latency.percentiles_ms(),
    }
    frame_ms = 1e3 * config.hop_length / config.sample_rate
    print(json.dumps(facts) if as_json else _summary(facts, frame_ms), file=sys.stderr)
    return 0


def _summary(facts: dict[str, Any], frame_ms: float) -> str:
    text = f"{facts['samples_in']} samples in, {facts['samples_out']} out, {facts['times_real_time']:.3g}x real time"
    if not facts["frames"]:
        return text
    percentiles = ", ".join(f"p{p} {facts[f'p{p}_ms']:.2f} ms" for p in (50, 95, 99))
    return f"{text}; latency of {facts['frames']} frames of {frame_ms:g} ms: {percentiles}"


def _flow(
    source: Source,
    sink: Sink,
    encoder: StreamingEncoder,
    decoder: StreamingDecoder,
    latency: Latency,
    piece: int,
    pace_hz: int | None,
) -> None:
    def send(codes: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        if codes[0].shape[2]:
            write(decoder.step(*codes))

    def write(audio: torch.Tensor, most: int | None = None) -> None:
        if audio.shape[2]:
            samples = finite(audio)[:most]
            sink.write(samples)
            latency.left(len(samples), time.perf_counter())

    for samples, now_s in _paced(source.pieces(piece), pace_hz):
        latency.came(len(samples), now_s)
        send(encoder.step(torch.from_numpy(samples).reshape(1, 1, -1)))
    latency.ended(time.perf_counter())
    codes = encoder.flush()
    rest = [decoder.step(*codes)] if codes[0].shape[2] else []
    # The last frame was filled up with zeros; what they became is not wanted.
    write(torch.cat([*rest, decoder.flush()], 2), latency.samples_in - latency.samples_out)


def _paced(pieces: Iterator[Samples], rate_hz: int | None) -> Iterator[tuple[Samples, float]]:
    """Pieces with the time at which they are there: when they are read, or when they would have been spoken."""
    begun_s, count = time.perf_counter(), 0
    for samples in pieces:
        count += len(samples)
        now_s = time.perf_counter()
        if rate_hz is not None:
            due_s = begun_s + count / rate_hz
            time.sleep(max(0.0, due_s - now_s))
            now_s = due_s
        yield samples, now_s


def run_serve(options: ModelOptions, limits: ServeOptions, verbose: bool = False) -> int:
    """Serves until SIGTERM or Ctrl-C.

    Args:
        options: which model, and how it runs.
        limits: where the server listens, and what it allows.
        verbose: whether a line on stderr tells of each stream's begin and end; with tracebacks asked for, also of where
            it comes from.
    Returns:
        The exit code.
    Raises:
        DualCodecError: the model can't be opened or can't stream, or the address can't be had.
        MissingExtraError: aiohttp or prometheus_client is missing.
    """
    from dualcodec_ext.serving import serve

    for package in ("aiohttp", "prometheus_client"):  # before the model, which takes longer to load
        need_extra(package, "serve", "serve")
    if verbose:
        told = logging.StreamHandler()
        told.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        ours = logging.getLogger("dualcodec_ext._serving")
        ours.addHandler(told)
        ours.setLevel(logging.DEBUG if debugging() else logging.INFO)
    codec = _opened(options, Report("serve", as_json=False))

    def started(server: Server) -> None:
        for task, why in server.info.unsupported.items():
            print(one_line(f"{task} is not served: {why}"), flush=True)
        print(one_line(f"{codec.name} at {server.url} (Ctrl-C ends)"), flush=True)

    serve(codec.model, codec.name, limits, started)
    return 0


def _opened(options: ModelOptions, report: Report) -> Codec:
    configure_torch(options)
    codec = open_model(*load_config(options.model or DEFAULT_MODEL), options, options.seed or 0)
    if codec.untrained:
        report.note(f"{UNTRAINED} (the weights are random numbers; --weights gives real ones)")
    return codec
