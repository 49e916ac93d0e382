"""Long clips: decoded and encoded in stretches, and parts of one decoded alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import spans
from .checks import check_codes, check_count, check_waves, naming_wrong_codes


class LongClips:
    """What `DualCodec` does with long clips."""

    dac: Any
    settings: dict[str, Any]
    _encode: Any
    _decode: Any
    _check_features: Any
    output_samples: Any
    training: bool

    def _entries(self) -> tuple[int, int]:
        return self.settings["semantic_codebook_size"], self.settings["codebook_size"]

    def _decoder_groups(self) -> Sequence[int] | None:
        return None  # every layer computes each of its rows alone

    def _spans(self) -> spans.Codec:
        return spans.codec_of(self, self._decoder_groups())

    def _decode_long(
        self, semantic_codes: Tensor, acoustic_codes: Tensor | None, frame_lengths: Tensor | None, chunk_frames: int
    ) -> Tensor:
        pieces = self._decode_pieces(semantic_codes, acoustic_codes, frame_lengths, chunk_frames)
        return spans.filled(pieces, self.output_samples(semantic_codes.shape[-1]))

    def _decode_pieces(
        self, semantic_codes: Tensor, acoustic_codes: Tensor | None, frame_lengths: Tensor | None, chunk_frames: int
    ) -> Iterator[Tensor]:
        samples = self.output_samples(semantic_codes.shape[-1])
        codes = semantic_codes, acoustic_codes
        return spans.decode_pieces(self._spans(), self._decode, codes, frame_lengths, samples, chunk_frames)

    def _encode_long(
        self,
        audio: Tensor | None,
        feat: Tensor,
        num_quantizers: int | None,
        sample_lengths: Tensor | None,
        frame_lengths: Tensor | None,
        chunk_frames: int,
    ) -> tuple[Tensor, Tensor | None]:
        def encode(heard: Tensor | None, x: Tensor, samples: Tensor | None, frames: Tensor | None) -> spans.Codes:
            return self._encode(heard, x, num_quantizers, samples, frames)

        heard = None if num_quantizers == 1 else audio
        samples = None if heard is None else sample_lengths
        pieces = spans.encode_pieces(self._spans(), encode, heard, feat, samples, frame_lengths, chunk_frames)
        return spans.filled_codes(pieces, feat.shape[-1])

    def _encode_pieces(
        self, pieces: Iterable[tuple[Tensor, Tensor]], num_quantizers: int | None, chunk_frames: int
    ) -> Iterator[spans.Codes]:
        def encode(heard: Tensor | None, x: Tensor, samples: Tensor | None, frames: Tensor | None) -> spans.Codes:
            return self._encode(heard, x, num_quantizers, samples, frames)

        return spans.encode_given(self._spans(), encode, pieces, num_quantizers != 1, chunk_frames)

    def encode_pieces(
        self,
        pieces: Iterable[tuple[Tensor, Tensor]],
        num_quantizers: int | None = None,
        chunk_frames: int = 750,
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Turn speech into codes, piece by piece, in memory that does not grow with the clip.

        Args:
            pieces: audio [B, 1, n] and features [B, semantic_dim, k] as they come, n and k from 0; joined they are what
                `encode` takes. One may run ahead of the other, and is kept until that has come.
            num_quantizers: as for `encode`.
            chunk_frames: frames that are encoded at a time, at most.

        Returns:
            An iterator over semantic codes [B, 1, n] and acoustic codes [B, q, n] or None, which joined are what
            `encode` gives.

        Raises:
            RuntimeError: the model is in training mode.
            ValueError: as `encode`; `pieces` can't be gone through, or one of them is no pair.
        """
        name = "DualCodec.encode_pieces"
        if self.training:
            raise RuntimeError(f"{name}: the model must be in eval mode, got training mode: call .eval()")
        chunk_frames = check_count(f"{name}: chunk_frames", chunk_frames)
        if num_quantizers is not None:
            num_quantizers = min(check_count(f"{name}: num_quantizers", num_quantizers), 1 + self.dac.n_codebooks)
        try:
            pieces = iter(pieces)
        except TypeError:
            raise ValueError(
                f"{name}: pieces must be pairs (audio [B, 1, n], features [B, C, k]), one after the other, got"
                f" {type(pieces).__name__}"
            ) from None
        return self._encode_pieces(self._checked(name, pieces, num_quantizers != 1), num_quantizers, chunk_frames)

    def _checked(
        self, name: str, pieces: Iterable[tuple[Tensor, Tensor]], acoustic: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        samples = frames = 0
        batch: int | None = None
        for piece in pieces:
            parts = len(piece) if isinstance(piece, (tuple, list)) else None
            if parts != 2:
                got = type(piece).__name__ if parts is None else f"{parts} of them"
                raise ValueError(f"{name}: every piece must be a pair (audio [B, 1, n], features [B, C, k]), got {got}")
            audio, features = piece
            features = self._check_features(name, features)
            batch = features.shape[0] if batch is None else batch
            if features.shape[0] != batch:
                raise ValueError(f"{name}: every piece must be of the first one's {batch} clips, got {len(features)}")
            if acoustic:
                check_waves(name, "audio_data", audio, batch)
                samples += audio.shape[-1]
            frames += features.shape[-1]
            yield audio, features
        if acoustic:
            self.dac.check_framing(samples, frames)

    @torch.no_grad()
    def decode_pieces(
        self, semantic_codes: Tensor, acoustic_codes: Tensor | None, chunk_frames: int = 750
    ) -> Iterator[Tensor]:
        """Turn codes into speech, piece by piece, in memory that does not grow with the clip.

        Args:
            semantic_codes, acoustic_codes: as for `decode_from_codes`; not looked at before their turn.
            chunk_frames: frames that are decoded at a time.

        Returns:
            An iterator over [B, 1, n], n at least 1, which joined are what `decode_from_codes` gives.

        Raises:
            ValueError: as `decode_from_codes`.
        """
        name = "DualCodec.decode_pieces"
        chunk_frames = check_count(f"{name}: chunk_frames", chunk_frames)
        codes = check_codes(name, semantic_codes, acoustic_codes, self.dac.n_codebooks)
        return self._named_pieces(name, codes, chunk_frames)

    def _named_pieces(self, name: str, codes: tuple[Tensor, Tensor | None], chunk_frames: int) -> Iterator[Tensor]:
        with naming_wrong_codes(name, *codes, self._entries()):
            yield from self._decode_pieces(*codes, None, chunk_frames)

    @torch.no_grad()
    def decode_span(self, semantic_codes: Tensor, acoustic_codes: Tensor | None, begin: int, end: int) -> Tensor:
        """Return `decode_from_codes(semantic_codes, acoustic_codes)[..., begin:end]` without decoding the rest.

        Args:
            semantic_codes, acoustic_codes: as for `decode_from_codes`; those of `span_frames` are looked at.
            begin, end: samples, 0 <= begin <= end <= S'.

        Returns:
            Audio [B, 1, end - begin].

        Raises:
            ValueError: as `decode_from_codes`, or samples that are not there.
        """
        name = "DualCodec.decode_span"
        codes = check_codes(name, semantic_codes, acoustic_codes, self.dac.n_codebooks)
        samples = self.output_samples(semantic_codes.shape[-1])
        if any(isinstance(value, bool) or not hasattr(value, "__index__") for value in (begin, end)):
            raise ValueError(f"{name}: begin and end must be integers, got {begin!r} and {end!r}")
        if not 0 <= begin <= end <= samples:
            raise ValueError(f"{name}: begin and end must be in [0, {samples}] and in order, got {begin} and {end}")
        with naming_wrong_codes(name, *codes, self._entries()):
            return spans.decode_span(self._spans(), self._decode, codes, None, begin, end)

    def span_frames(self, begin: int, end: int, frames: int) -> tuple[int, int]:
        """Return (first, last): the frames, of a clip's `frames`, that its samples begin to end depend on.

        Decoded as a clip of its own, sample s - first * hop of frames first to last is sample s of the whole.
        """
        return self._spans().frames_to_decode(begin, end, frames)

    def encode_span_frames(self, begin: int, end: int, frames: int, acoustic: bool = True) -> tuple[int, int]:
        """Return (first, last): the frames of features and audio that the codes of frames begin to end depend on.

        Encoded as a clip of its own, frame f - first of frames first to last is frame f of the whole.

        Args:
            begin, end: frames whose codes are wanted.
            frames: of the whole clip.
            acoustic: whether acoustic codes are wanted.
        """
        return self._spans().frames_to_encode(begin, end, frames, acoustic)
