"""Which frames a stretch of a long clip needs, and long clips in stretches of bounded memory.

A stretch is computed as a clip of its own: with as many frames around it as its layers reach, and beginning where every
layer that computes rows in groups begins a group. What its cut edges spoil is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .layers import CausalConv1d, CausalUpsample, ConvNeXtBlock, ResidualUnit, WNConv1d, WNConvTranspose1d

Codes = tuple[Tensor, Tensor | None]  # semantic [B, 1, F], acoustic [B, q, F]
# (semantic codes, acoustic codes, frames of the clips [B] or None) -> audio
Decode = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
# (audio or None, features, samples of the clips or None, their frames or None) -> codes
Encode = Callable[[Tensor | None, Tensor, Tensor | None, Tensor | None], Codes]


@dataclass(frozen=True)
class Reach:
    """A layer: output rows o need input rows (o * down - before) // up to (o * down + after) // up."""

    down: int = 1
    up: int = 1
    before: int = 0
    after: int = 0
    group: int = 1


def reaches(modules: Sequence[nn.Module]) -> list[Reach]:
    """Return how far each layer of a run of modules reaches."""
    found: list[Reach] = []
    for module in modules:
        if isinstance(module, CausalConv1d):
            module = module.conv
        if isinstance(module, WNConv1d):
            left = module.padding[0]
            after = (module.kernel_size - 1) * module.dilation - left
            found.append(Reach(module.stride, 1, left, after))
        elif isinstance(module, WNConvTranspose1d):
            assert module.kernel_size == 2 * module.stride
            found.append(Reach(1, module.stride, module.stride - module.padding[0], module.padding[0]))
        elif isinstance(module, CausalUpsample):
            found.append(Reach(1, module.stride, *module.padding))
        elif isinstance(module, ResidualUnit):
            reach = 6 * module.dilation
            before = reach if module.causal else reach // 2
            found.append(Reach(1, 1, before, reach - before))
        elif isinstance(module, ConvNeXtBlock):
            before = 6 if module.is_causal else 3
            found.append(Reach(1, 1, before, 6 - before))
        else:  # activations have neither children nor reach
            inner = getattr(module, "block", module)
            found += reaches(list(inner.children()))
    return found


def needed(layers: Sequence[Reach], begin: int, end: int) -> tuple[int, int]:
    """Return the input rows that output rows begin to end need; they may lie outside of the clip."""
    for layer in reversed(layers):
        begin, end = begin - begin % layer.group, end + -end % layer.group
        begin = (begin * layer.down - layer.before) // layer.up
        end = ((end - 1) * layer.down + layer.after) // layer.up + 1
    return begin, end


def alignment(layers: Sequence[Reach], rows_per_frame: int) -> int:
    """Return the frames on whose multiples a stretch may begin, so that every layer's groups stay where they are."""
    unit, rows = 1, rows_per_frame
    for layer in layers:
        rows = rows * layer.up // layer.down
        unit = math.lcm(unit, layer.group // math.gcd(layer.group, rows))
    return unit


@dataclass(frozen=True)
class Codec:
    """What the stretches of a model need to know of it.

    Args:
        semantic_encoder, semantic_decoder, acoustic_encoder, decoder: the layers; the second one is empty where the
            latent goes on as it is.
        hop_samples: per frame.
    """

    semantic_encoder: Sequence[Reach]
    semantic_decoder: Sequence[Reach]
    acoustic_encoder: Sequence[Reach]
    decoder: Sequence[Reach]
    hop_samples: int

    def frames_to_decode(self, begin: int, end: int, frames: int) -> tuple[int, int]:
        """Return the frames, of a clip's, that its samples begin to end need: as a clip they give the same samples.

        Sample s of the clip is sample s - first * hop of theirs.
        """
        layers = [*self.semantic_decoder, *self.decoder]
        first, last = needed(layers, begin, end)
        return _within(first, last, alignment(layers, 1), frames)

    def frames_to_encode(self, begin: int, end: int, frames: int, acoustic: bool) -> tuple[int, int]:
        """Return the frames of features and audio that the codes of frames begin to end need."""
        if not acoustic:
            return _within(*needed(self.semantic_encoder, begin, end), 1, frames)
        semantic = [*self.semantic_encoder, *self.semantic_decoder]
        first, last = needed(semantic, begin, end)
        first_sample, last_sample = needed(self.acoustic_encoder, begin, end)
        hop = self.hop_samples
        unit = math.lcm(alignment(semantic, 1), alignment(self.acoustic_encoder, hop))
        return _within(min(first, first_sample // hop), max(last, -(-last_sample // hop)), unit, frames)


def codec_of(model: Any, groups: Sequence[int] | None = None) -> Codec:
    """Return what the stretches of a `DualCodec` need to know; groups: rows that each decoder layer computes as one."""
    decoder = reaches(list(model.dac.decoder.model))
    if groups is not None:
        decoder = [replace(layer, group=group) for layer, group in zip(decoder, groups, strict=True)]
    return Codec(
        reaches(list(model.convnext_encoder)),
        reaches(list(model.convnext_decoder)) if model.decode_semantic_for_codec else [],
        reaches(list(model.dac.encoder.block)),
        decoder,
        model.dac.hop_length,
    )


def _within(first: int, last: int, unit: int, frames: int) -> tuple[int, int]:
    first = max(0, first)
    return first - first % unit, min(frames, last)


def _shifted(lengths: Tensor | None, first: int, last: int) -> Tensor | None:
    return None if lengths is None else (lengths - first).clamp(0, last - first)


@torch.no_grad()
def decode_span(
    codec: Codec,
    decode: Decode,
    codes: Codes,
    lengths: Tensor | None,
    begin: int,
    end: int,
) -> Tensor:
    """Return samples begin to end of what decoding the whole of the codes gives."""
    semantic, acoustic = codes
    first, last = codec.frames_to_decode(begin, end, semantic.shape[-1])
    part = None if acoustic is None else acoustic[..., first:last].to(torch.int64)
    audio = decode(semantic[..., first:last].to(torch.int64), part, _shifted(lengths, first, last))
    skipped = first * codec.hop_samples
    return audio[..., begin - skipped : end - skipped]


def decode_pieces(
    codec: Codec,
    decode: Decode,
    codes: Codes,
    lengths: Tensor | None,
    samples: int,
    chunk_frames: int,
) -> Iterator[Tensor]:
    """Yield what decoding the whole of the codes gives, `samples` in all, chunk_frames frames at a time."""
    step = chunk_frames * codec.hop_samples
    for begin in range(0, samples, step):
        yield decode_span(codec, decode, codes, lengths, begin, min(samples, begin + step))


def encode_pieces(
    codec: Codec,
    encode: Encode,
    audio: Tensor | None,  # [B, 1, S]; None: semantic codes alone
    features: Tensor,  # [B, semantic_dim, F]
    sample_lengths: Tensor | None,
    frame_lengths: Tensor | None,
    chunk_frames: int,
) -> Iterator[Codes]:
    """Yield the codes of the whole, chunk_frames frames at a time."""
    frames, hop = features.shape[-1], codec.hop_samples
    for begin in range(0, frames, chunk_frames):
        end = min(frames, begin + chunk_frames)
        first, last = codec.frames_to_encode(begin, end, frames, audio is not None)
        heard, samples = None, None
        if audio is not None:
            # The features may end before the audio, whose last frames are then heard all the same.
            until = audio.shape[-1] if last == frames else last * hop
            heard = audio[..., first * hop : until]
            samples = _shifted(sample_lengths, first * hop, first * hop + heard.shape[-1])
        with torch.no_grad():
            codes = encode(heard, features[..., first:last], samples, _shifted(frame_lengths, first, last))
        semantic, acoustic = (None if c is None else c[..., begin - first : end - first] for c in codes)
        assert semantic is not None
        yield semantic, acoustic


class _Held:
    """Samples or frames [B, C, n] that come in pieces and are let go from the front."""

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
        begin = min(begin, self.end)
        if begin > self.first:
            self._parts = [self.between(begin, self.end).clone()]
            self.first = begin


class _Chunks:
    """Audio and features in, codes out, chunk by chunk, each with the frames around it that its layers reach."""

    def __init__(self, codec: Codec, encode: Encode, acoustic: bool, chunk_frames: int) -> None:
        self._codec, self._code, self._acoustic, self._chunk = codec, encode, acoustic, chunk_frames
        self._audio, self._features = _Held(), _Held()
        self._done = 0

    def add(self, audio: Tensor, features: Tensor) -> None:
        self._features.add(features)
        if self._acoustic:
            self._audio.add(audio)

    def ready(self) -> Iterator[Codes]:
        """Yield the codes of the chunks that what has come suffices for."""
        there = self._features.end
        if self._acoustic:
            there = min(there, self._audio.end // self._codec.hop_samples)
        while self._needed(self._done + self._chunk)[1] <= there:
            yield self._encode(self._done + self._chunk, there, False)

    def finish(self) -> Iterator[Codes]:
        """Yield the rest."""
        frames = self._features.end
        while self._done < frames:
            yield self._encode(min(frames, self._done + self._chunk), frames, True)

    def _needed(self, end: int, frames: int = 1 << 60) -> tuple[int, int]:
        return self._codec.frames_to_encode(self._done, end, frames, self._acoustic)

    @torch.no_grad()
    def _encode(self, end: int, frames: int, ended: bool) -> Codes:
        hop = self._codec.hop_samples
        first, last = self._needed(end, frames)
        heard = None
        if self._acoustic:  # the features may end before the audio, whose last frames are then heard all the same
            heard = self._audio.between(first * hop, self._audio.end if ended and last == frames else last * hop)
        semantic, acoustic = self._code(heard, self._features.between(first, last), None, None)
        own = slice(self._done - first, end - first)
        self._done = end
        first = self._needed(end + 1)[0]
        self._features.drop(first)
        self._audio.drop(first * hop)
        return semantic[..., own], None if acoustic is None else acoustic[..., own]


def encode_given(
    codec: Codec, encode: Encode, pieces: Iterable[tuple[Tensor, Tensor]], acoustic: bool, chunk_frames: int
) -> Iterator[Codes]:
    """Yield the codes of audio [B, 1, n] and features [B, semantic_dim, k] as they come, chunk_frames at a time."""
    chunks = _Chunks(codec, encode, acoustic, chunk_frames)
    for audio, features in pieces:
        chunks.add(audio, features)
        yield from chunks.ready()
    yield from chunks.finish()


def filled(pieces: Iterator[Tensor], length: int) -> Tensor:
    """Return pieces [B, C, n], at least one, joined to [B, C, length], without holding them all."""
    whole: Tensor | None = None
    at = 0
    for piece in pieces:
        if whole is None:
            whole = piece.new_empty(*piece.shape[:-1], length)
        whole[..., at : at + piece.shape[-1]] = piece
        at += piece.shape[-1]
    assert whole is not None and at == length
    return whole


def filled_codes(pieces: Iterator[Codes], frames: int) -> Codes:
    """As `filled`, of both kinds of codes."""
    joined: Codes | None = None
    at = 0
    for semantic, acoustic in pieces:
        if joined is None:
            empty = [None if c is None else c.new_empty(*c.shape[:-1], frames) for c in (semantic, acoustic)]
            assert empty[0] is not None
            joined = empty[0], empty[1]
        stretch = slice(at, at + semantic.shape[-1])
        joined[0][..., stretch] = semantic
        if joined[1] is not None and acoustic is not None:
            joined[1][..., stretch] = acoustic
        at = stretch.stop
    assert joined is not None and at == frames
    return joined
