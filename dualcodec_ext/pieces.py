"""Decode on the CPU piece by piece: what tiles give leaves as it comes, so that a clip's audio is never whole."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .pipeline import Inlet
from .tiles import Tiles

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
    decoder = tiles.decoders.take(batch, min(frames, chunk_frames))
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
