"""How codes use their codebooks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def codebook_use(rows: Iterable[Any], sizes: Iterable[int]) -> dict[str, list[float]]:
    """How codes use their codebooks.

    Args:
        rows: integers [F] per codebook, F from 1.
        sizes: entries per codebook.
    Returns:
        Per codebook the share of entries that occur, `codebook_use`, and the entropy of the codes, `entropy_bits`.
    """
    import numpy as np

    rows = list(rows)
    return {
        "codebook_use": [round(len(np.unique(row)) / size, 4) for row, size in zip(rows, sizes, strict=True)],
        "entropy_bits": [round(entropy_bits(row), 2) for row in rows],
    }


def entropy_bits(codes: Any) -> float:
    """The entropy of codes, an array or a tensor on the CPU of at least one integer, in bits."""
    import numpy as np

    counts = np.unique(codes, return_counts=True)[1]
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum()) + 0.0  # not -0.0
