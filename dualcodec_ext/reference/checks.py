"""What calls of the model are checked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import ops

MOST_SHORT_FRAMES = 2  # by which features may end before their audio, as w2v-BERT's framing has it


def check_count(what: str, count: Any) -> int:
    """Return count as an int; raise one line unless it is an integer from 1."""
    if isinstance(count, bool) or not hasattr(count, "__index__"):
        raise ValueError(f"{what} must be an integer, got {count!r}")
    if count < 1:
        raise ValueError(f"{what} must be at least 1, got {count}")
    return int(count)


def check_waves(name: str, argument: str, waves: Any, batch: int | None = None) -> None:
    """Raise one line unless waves is a float tensor [B, 1, S], of that batch where it is given."""
    wanted = f"{name}: {argument} must be [{'B' if batch is None else batch}, 1, S] float"
    if not isinstance(waves, Tensor):
        raise ValueError(f"{wanted}, got {type(waves).__name__}")
    fits = waves.dim() == 3 and waves.shape[1] == 1 and waves.shape[0] == (waves.shape[0] if batch is None else batch)
    if not fits or not waves.is_floating_point():
        raise ValueError(f"{wanted}, got {list(waves.shape)} {waves.dtype}")


def check_lengths(name: str, lengths: Tensor, x: Tensor, argument: str = "lengths") -> None:
    """Raise one line unless lengths is [B] int64, each from 0 to T of x [B, ..., T]."""
    if not isinstance(lengths, Tensor) or lengths.dtype != torch.int64 or lengths.shape != x.shape[:1]:
        got = f"{list(lengths.shape)} {lengths.dtype}" if isinstance(lengths, Tensor) else type(lengths).__name__
        raise ValueError(f"{name}: {argument} must be [{x.shape[0]}] int64, got {got}")
    if ((lengths < 0) | (lengths > x.shape[-1])).any():
        raise ValueError(f"{name}: {argument} must be in [0, {x.shape[-1]}], got {lengths.tolist()}")


def check_codes_shape(name: str, argument: str, codes: Tensor, fewest: int, most: int) -> None:
    """Raise one line unless codes is an integer tensor [B, fewest to most, F]."""
    stages = str(most) if fewest == most else f"{fewest} to {most}"
    if not isinstance(codes, Tensor):
        raise ValueError(f"{name}: {argument} must be [B, {stages}, F] integers, got {type(codes).__name__}")
    whole = not (codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool)
    if codes.dim() != 3 or not fewest <= codes.shape[1] <= most or not whole:
        raise ValueError(f"{name}: {argument} must be [B, {stages}, F] integers, got {list(codes.shape)} {codes.dtype}")


def check_codes(
    name: str, semantic_codes: Tensor, acoustic_codes: Tensor | None, n_codebooks: int
) -> tuple[Tensor, Tensor | None]:
    """Return the codes, None for acoustic ones of no codebook; raise one line unless they fit each other."""
    check_codes_shape(name, "semantic_codes", semantic_codes, 1, 1)
    if acoustic_codes is None:
        return semantic_codes, None
    check_codes_shape(name, "acoustic_codes", acoustic_codes, 0, n_codebooks)
    if acoustic_codes.shape[::2] != semantic_codes.shape[::2]:
        raise ValueError(
            f"{name}: acoustic_codes must have the batch and frames of semantic_codes"
            f" {list(semantic_codes.shape)}, got {list(acoustic_codes.shape)}"
        )
    return semantic_codes, acoustic_codes if acoustic_codes.shape[1] else None


@contextmanager
def naming_wrong_codes(
    name: str,
    semantic_codes: Tensor,
    acoustic_codes: Tensor | None,
    entries: tuple[int, int],  # of the semantic codebook, and of each acoustic one
    lengths: Tensor | None = None,
) -> Iterator[None]:
    """Name the caller's argument where what runs inside refuses a code: it is looked at there, and again on failure."""
    try:
        yield
    except ValueError:
        codes = {"semantic_codes": semantic_codes, "acoustic_codes": acoustic_codes}
        for (argument, values), count in zip(codes.items(), entries, strict=True):
            if values is not None:
                read = ops.mask_past_lengths(values.to(torch.int64), lengths)
                ops.check_codes(name, read, count, argument)
        raise
