"""Encode and decode on the CPU piece by piece: what tiles give leaves as it comes, so that no clip is ever whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .pipeline import Inlet
from .tiles import EncodeTiles, Keep, Tiles

_STEP_FRAMES = 128  # written at once: tiles gather what they need, and what leaves stays small


class Pieces(Inlet):
    """Samples [B, 1, n] as they come; `taken` gives those since the last time.

    Args:
        batch: clips side by side.
        dtype: of the samples.
    """

    def __init__(self, batch: int, dtype: torch.dtype) -> None:
        super().__init__(batch)
        self._dtype = dtype
        self._parts: list[Tensor] = []

    def space(self) -> int:
        return 1 << 62

    def target(self, count: int) -> Tensor:
        memory = torch.empty(self.batch, count, 1, dtype=self._dtype)
        self._parts.append(memory.transpose(1, 2))
        return self._parts[-1]

    def _tail(self, count: int) -> Tensor:
        return self._parts[-1]

    def taken(self) -> Tensor:
        parts, self._parts = self._parts, []
        return torch.cat(parts, 2) if parts else torch.empty(self.batch, 1, 0, dtype=self._dtype)


def decode_pieces(tiles: Tiles, semantic: Tensor, acoustic: Tensor | None, chunk_frames: int) -> Iterator[Tensor]:
    """Yield the samples of codes [B, 1, F] and [B, q, F], of any integer type, in pieces [B, 1, n], n from 1."""
    batch, _, frames = semantic.shape
    if not batch * frames:
        return
    outlet = Pieces(batch, tiles.programs.dtype)
    decoder = tiles.decoders.take(batch, min(frames, tiles.piece_frames(chunk_frames)))
    with torch.no_grad():
        decoder.start(outlet)
    sums = decoder.pipeline.nodes[len(tiles.programs.semantic_decoder)]  # what it holds has its acoustic codes
    behind = 0  # the first frame whose acoustic codes are still to be looked up
    step = min(chunk_frames, _STEP_FRAMES)
    for at in range(0, frames, step):
        end = min(frames, at + step)
        held = None if acoustic is None else acoustic[:, :, behind:end].to(torch.int64)
        with torch.no_grad():
            decoder.write(semantic[:, :, at:end].to(torch.int64), held, behind)
            if end == frames:
                decoder.finish()
        behind = sums.end
        piece = outlet.taken()
        if piece.numel():  # what comes first may wait for more codes
            yield piece
    tiles.decoders.give(decoder)


class CodePieces:
    """Codes as they come, semantic ones first: `taken` gives those of the frames that have all of theirs.

    Args:
        acoustic: whether there are acoustic codes.
    """

    def __init__(self, acoustic: bool) -> None:
        self._kinds: tuple[list[Tensor], ...] = ([], []) if acoustic else ([],)

    def keep(self, kind: int) -> Keep:
        """Return what takes the semantic codes, 0, or the acoustic ones, 1."""

        def keep(codes: Tensor, first: int) -> None:
            self._kinds[kind].append(codes)

        return keep

    def taken(self) -> tuple[Tensor, Tensor | None] | None:
        if not all(self._kinds):
            return None
        joined = [parts[0] if len(parts) == 1 else torch.cat(parts, 2) for parts in self._kinds]
        count = min(codes.shape[2] for codes in joined)
        for parts, codes in zip(self._kinds, joined, strict=True):
            parts[:] = [codes[:, :, count:]] if codes.shape[2] > count else []
        found = [codes[:, :, :count] for codes in joined]
        return found[0], found[1] if len(found) > 1 else None


def encode_pieces(
    tiles: Tiles, pieces: Iterable[tuple[Tensor, Tensor]], stages: int, chunk_frames: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield the codes of audio [B, 1, n] and features [B, C, k] as they come; stages: acoustic ones, 0 for none."""
    encoder: EncodeTiles | None = None
    codes = CodePieces(stages > 0)
    for audio, features in pieces:
        with torch.no_grad():
            if encoder is None:
                frames = tiles.piece_frames(chunk_frames)
                encoder = tiles.encoders(stages > 0).take(features.shape[0], frames)
                encoder.start(stages, (codes.keep(0), codes.keep(1)))
            if stages:
                encoder.audio.add(audio)
            encoder.features.add(features)
            encoder.advance()
        if (found := codes.taken()) is not None:
            yield found
    if encoder is not None:
        with torch.no_grad():
            encoder.finish()
        if (found := codes.taken()) is not None:
            yield found
        tiles.encoders(stages > 0).give(encoder)
