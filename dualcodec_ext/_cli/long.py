"""Long recordings on the command line: read, coded and written as they go, in memory that does not grow with them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dualcodec_ext.audio import AudioWriter, Resampler, fit_length, resampled_length
from dualcodec_ext.codes import CodeFile
from dualcodec_ext.errors import DualCodecError

if TYPE_CHECKING:
    from dualcodec_ext._cli.codec import Codec
    from dualcodec_ext.audio import AudioReader, Samples

LONG_S = 60.0  # past it the command line works in chunks
CHUNK_FRAMES = 1500
_BLOCK_SAMPLES = 1 << 16

Advance = Callable[[float], object]  # takes the seconds of recording that were done since its last call


def chunk_for(duration_s: float, chunk_frames: int | None) -> int | None:
    """Picks the frames that are worked on at a time.

    Args:
        duration_s: length of the recording.
        chunk_frames: what the user asks for: None leaves it to the length, 0 means whole recordings.
    Returns:
        The number of frames, or None for the whole at once.
    """
    if chunk_frames is None:
        return CHUNK_FRAMES if duration_s > LONG_S else None
    return chunk_frames or None


class CodeSpool:
    """Codes kept on disk while they come, in a temporary file without a name.

    Args:
        codebooks: codes per frame, the semantic one among them.
    """

    def __init__(self, codebooks: int) -> None:
        self._codebooks = codebooks
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the codes
        self.frames = 0

    def write(self, semantic: Any, acoustic: Any | None) -> None:
        """Takes uint16 [1, n] and [Q, n] or None."""
        codes = semantic if acoustic is None else np.concatenate([semantic, acoustic])
        self._file.write(np.ascontiguousarray(codes.T, "<u2").tobytes())
        self.frames += codes.shape[1]

    def codes(self) -> tuple[Any, Any | None]:
        """All of them, at least one frame: uint16 [1, F] and [Q, F] or None, mapped from the file."""
        self._file.flush()
        rows = np.memmap(self._file, "<u2", "c", shape=(self.frames, self._codebooks)).T
        return rows[:1], rows[1:] if self._codebooks > 1 else None


class Held:
    """Samples or frames [1, C, n] that come in pieces and are let go from the front."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self.first = self.end = 0

    def add(self, part: Tensor) -> None:
        self._parts.append(part)
        self.end += part.shape[-1]

    def between(self, begin: int, end: int) -> Tensor:
        whole = torch.cat(self._parts, -1) if len(self._parts) > 1 else self._parts[0]
        self._parts = [whole]
        return whole[..., begin - self.first : end - self.first]

    def drop(self, begin: int) -> None:
        """Let go what lies before `begin`."""
        if begin > self.first:
            self._parts = [self.between(begin, self.end).clone()]
            self.first = begin


class ChunkedEncoder:
    """Audio and features in, codes out, chunk by chunk, each with the frames around it that its layers reach.

    Args:
        codec: the model.
        quantizers: codebooks to use, the semantic one among them; None for all.
        chunk_frames: codes per chunk.
    """

    def __init__(self, codec: Codec, quantizers: int | None, chunk_frames: int) -> None:
        self._codec, self._quantizers, self._chunk = codec, quantizers, chunk_frames
        self._hop = codec.config.hop_length
        self.audio, self.features = Held(), Held()
        self.done = 0

    def ready(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yields the codes of the chunks that what has come suffices for."""
        there = min(self.audio.end // self._hop, self.features.end)
        while self._needed(self.done + self._chunk)[1] <= there:
            yield self._encode(self.done + self._chunk, there)

    def finish(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yields the rest; there are as many frames of features as of audio."""
        frames = self.features.end
        while self.done < frames:
            yield self._encode(min(frames, self.done + self._chunk), frames)

    def _needed(self, end: int, frames: int = 1 << 60) -> tuple[int, int]:
        return self._codec.model.encode_span_frames(self.done, end, frames, self._quantizers != 1)

    def _encode(self, end: int, frames: int) -> tuple[Tensor, Tensor | None]:
        first, last = self._needed(end, frames)
        parameter = next(self._codec.model.parameters())
        semantic, acoustic = self._codec.model.encode(
            self.audio.between(first * self._hop, min(self.audio.end, last * self._hop)).to(parameter),
            num_quantizers=self._quantizers,
            sample_rate=self._codec.config.sample_rate,
            semantic_repr=self.features.between(first, last).to(parameter),
        )
        own = slice(self.done - first, end - first)
        self.done = end
        first = self._needed(end + 1)[0]
        self.audio.drop(min(first * self._hop, self.audio.end))
        self.features.drop(min(first, self.features.end))
        return semantic[..., own], None if acoustic is None else acoustic[..., own]


@torch.no_grad()
def encode_long(
    codec: Codec, reader: AudioReader, quantizers: int | None, chunk_frames: int, advance: Advance
) -> CodeFile:
    """Turns a recording into codes as it is read.

    Args:
        codec: opened for encoding.
        reader: the recording.
        quantizers: codebooks to use, the semantic one among them; None for all.
        chunk_frames: codes that are computed at a time.
        advance: told of the seconds that have been read.
    Returns:
        As `Codec.encode`; its codes lie in a temporary file.
    Raises:
        DualCodecError: as `Codec.encode`, or what reading brings up.
    """
    from dualcodec_ext._cli.codec import fitted, to_uint16

    assert codec.features is not None
    config, rate_hz = codec.config, reader.sample_rate_hz
    spool = CodeSpool(1 + config.n_codebooks if quantizers is None else quantizers)
    resampler = Resampler(rate_hz, config.sample_rate)
    features = codec.features.stream()
    encoder = ChunkedEncoder(codec, quantizers, chunk_frames)

    def take(samples: Samples) -> None:
        audio = torch.from_numpy(samples).reshape(1, 1, -1)
        encoder.audio.add(audio)
        encoder.features.add(features.write(audio))

    def keep(pieces: Iterator[tuple[Tensor, Tensor | None]]) -> None:
        for semantic, acoustic in pieces:
            spool.write(to_uint16(semantic), None if acoustic is None else to_uint16(acoustic))

    for block in reader.blocks(_BLOCK_SAMPLES):
        take(resampler.write(block))
        keep(encoder.ready())
        advance(len(block) / rate_hz)
    take(resampler.finish())
    if not encoder.audio.end:  # too short for one sample at the model's rate
        take(np.zeros(1, np.float32))
    frames = -(-encoder.audio.end // config.hop_length)
    rest = features.finish()
    if not encoder.features.end + rest.shape[-1]:
        rest = codec.features_of_little(encoder.audio.between(0, encoder.audio.end))
    rest, repeated = fitted(rest, frames - encoder.features.end)
    encoder.features.add(rest)
    keep(encoder.finish())
    return codec.code_file(*spool.codes(), reader.samples, rate_hz, repeated)


class _Exactly:
    """Lets `length` samples through, and at the end fills up with zeros."""

    def __init__(self, length: int) -> None:
        self._left = length

    def take(self, samples: Samples) -> Samples:
        samples = samples[: self._left]
        self._left -= len(samples)
        return samples

    def rest(self) -> Samples:
        return self.take(np.zeros(self._left, np.float32))


@torch.no_grad()
def decode_long(
    codec: Codec, codes: CodeFile, rate_hz: int | None, chunk_frames: int, advance: Advance
) -> Iterator[Samples]:
    """Turns codes into audio of the recording's exact length, piece by piece.

    Args:
        codec: the model.
        codes: made by this model.
        rate_hz: sample rate wanted; None for the model's.
        chunk_frames: frames that are decoded at a time.
        advance: told of the seconds that have been decoded.
    Returns:
        float32 pieces, which joined are what `Codec.decode` gives.
    Raises:
        DualCodecError: the model's output is not finite.
    """
    model_hz = codec.config.sample_rate
    rate_hz = rate_hz or model_hz
    resampler = Resampler(model_hz, rate_hz)
    decoded = _Exactly(max(1, codes.model_samples))
    written = _Exactly(resampled_length(codes.source_samples, codes.source_rate_hz, rate_hz))
    for piece in codec.model.decode_pieces(*tensors(codec, codes, mapped=True), chunk_frames):
        samples = finite(piece)
        codes.let_go()
        advance(len(samples) / model_hz)
        yield written.take(resampler.write(decoded.take(samples)))
    yield written.take(resampler.write(decoded.rest()))
    yield written.take(resampler.finish())
    yield written.rest()


def decode_span(codec: Codec, codes: CodeFile, begin_s: float, end_s: float | None, rate_hz: int | None) -> Samples:
    """Turns a part of codes into audio, reading and decoding what it depends on alone.

    Args:
        codec: the model.
        codes: made by this model; best mapped from the file.
        begin_s, end_s: in seconds of the recording; None for its end.
        rate_hz: sample rate wanted; None for the model's.
    Returns:
        float32, samples round(begin_s * rate) to round(end_s * rate) of what `Codec.decode` gives; at another rate than
        the model's within the rounding of the resampling.
    Raises:
        DualCodecError: a part that the recording does not have, codes out of range, or output that is not finite.
    """
    if end_s is None:
        end_s = codes.duration_s
        if not 0 <= begin_s < end_s:
            raise DualCodecError(f"--from must lie before the end, {end_s:g} s, got {begin_s:g}")
    if not 0 <= begin_s < end_s:
        raise DualCodecError(f"--from must lie before --to, got {begin_s:g} and {end_s:g}")
    if end_s > codes.duration_s:
        raise DualCodecError(f"--to must be at most {codes.duration_s:g}, the recording's seconds, got {end_s:g}")
    model_hz = codec.config.sample_rate
    rate_hz = rate_hz or model_hz
    begin, end = round(begin_s * rate_hz), round(end_s * rate_hz)
    if begin == end:
        raise DualCodecError(f"--from {begin_s:g} and --to {end_s:g} are the same sample at {rate_hz} Hz")
    if rate_hz == model_hz:
        return _model_span(codec, codes, begin, end)
    # Resampling filters reach far less than a second; and whole seconds keep the two rates in step.
    first_s, last_s = max(0, begin // rate_hz - 1), end // rate_hz + 2
    resampler = Resampler(model_hz, rate_hz)
    source = _model_span(codec, codes, first_s * model_hz, min(codes.model_samples, last_s * model_hz))
    samples = np.concatenate([resampler.write(source), resampler.finish()])
    skipped = first_s * rate_hz
    return fit_length(samples[begin - skipped :], end - begin)


@torch.no_grad()
def _model_span(codec: Codec, codes: CodeFile, begin: int, end: int) -> Samples:
    """Samples begin to end at the model's rate."""
    model, hop = codec.model, codec.config.hop_length
    last_sample = min(end, model.output_samples(codes.frames))  # a centred decoder ends a few samples early
    if begin >= last_sample:
        return np.zeros(end - begin, np.float32)
    first, last = model.span_frames(begin, last_sample, codes.frames)
    semantic, acoustic = codes.span(first, last)
    audio = model.decode_from_codes(*tensors(codec, replace(codes, semantic=semantic, acoustic=acoustic)))
    return fit_length(finite(audio[..., begin - first * hop : last_sample - first * hop]), end - begin)


def write_pieces(target: Path, pieces: Iterator[Samples], rate_hz: int, kind: str, comment: str | None) -> int:
    """Writes audio as it comes, whole or not at all.

    Returns:
        The number of samples.
    """
    samples = 0
    with AudioWriter(target, rate_hz, kind, comment) as file:
        for piece in pieces:
            file.write(piece)
            samples += len(piece)
    return samples


def finite(wave: Tensor) -> Samples:
    """The samples of [1, 1, n], or an error where one of them is not finite."""
    samples = wave[0, 0].float().cpu().numpy()
    if not np.isfinite(samples).all():
        raise DualCodecError(f"the model's output is not finite in {str(wave.dtype).removeprefix('torch.')}")
    return samples


def tensors(codec: Codec, codes: CodeFile, mapped: bool = False) -> tuple[Tensor, Tensor | None]:
    """The codes as [1, 1, F] and [1, Q, F] integers on the model's device; mapped: where they are, on the CPU."""
    device = next(codec.model.parameters()).device

    def tensor(values: Any) -> Tensor:
        if mapped and device.type == "cpu" and values.flags.writeable:
            return torch.from_numpy(values)[None]
        return torch.from_numpy(np.array(values, np.int32))[None].to(device)

    return tensor(codes.semantic), None if codes.acoustic is None else tensor(codes.acoustic)
