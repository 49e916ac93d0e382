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
        advance: told of the seconds that have been encoded.
    Returns:
        As `Codec.encode`; its codes lie in a temporary file.
    Raises:
        DualCodecError: as `Codec.encode`, or what reading brings up.
    """
    from dualcodec_ext._cli.codec import to_uint16

    config, rate_hz = codec.config, reader.sample_rate_hz
    spool = CodeSpool(1 + config.n_codebooks if quantizers is None else quantizers)
    given = _Given(codec, reader, advance)
    for semantic, acoustic in codec.model.encode_pieces(given.pieces(), quantizers, chunk_frames):
        spool.write(to_uint16(semantic), None if acoustic is None else to_uint16(acoustic))
    return codec.code_file(*spool.codes(), reader.samples, rate_hz, given.repeated)


class _Given:
    """What a recording gives the encoder.

    Args:
        codec: opened for encoding.
        reader: the recording.
        advance: told of the seconds that have been read.
    """

    def __init__(self, codec: Codec, reader: AudioReader, advance: Advance) -> None:
        assert codec.features is not None
        self._codec, self._reader, self._advance = codec, reader, advance
        self._features = codec.features.stream()
        self._parameter = next(codec.model.parameters())
        self._samples = self._frames = 0
        self._opening = torch.zeros(1, 1, 0)  # what a recording too short for features is
        self.repeated = 0  # frames that repeat the last one, once all have come

    def pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields audio [1, 1, n] and features [1, C, k]."""
        from dualcodec_ext._cli.codec import fitted

        codec, reader = self._codec, self._reader
        hop, rate_hz = codec.config.hop_length, reader.sample_rate_hz
        resampler = Resampler(rate_hz, codec.config.sample_rate)
        for block in reader.blocks(_BLOCK_SAMPLES):
            yield self._piece(resampler.write(block))
            self._advance(len(block) / rate_hz)
        yield self._piece(resampler.finish())
        if not self._samples:  # too short for one sample at the model's rate
            yield self._piece(np.zeros(1, np.float32))
        rest = self._features.finish()
        if not self._frames + rest.shape[-1]:
            rest = codec.features_of_little(self._opening)
        rest, self.repeated = fitted(rest, -(-self._samples // hop) - self._frames)
        yield torch.zeros(1, 1, 0).to(self._parameter), rest.to(self._parameter)

    def _piece(self, samples: Samples) -> tuple[Tensor, Tensor]:
        audio = torch.from_numpy(samples).reshape(1, 1, -1)
        features = self._features.write(audio)
        self._samples += audio.shape[-1]
        self._frames += features.shape[-1]
        if self._opening.shape[-1] < 2 * self._codec.config.hop_length:
            self._opening = torch.cat([self._opening, audio], -1)
        return audio.to(self._parameter), features.to(self._parameter)


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
