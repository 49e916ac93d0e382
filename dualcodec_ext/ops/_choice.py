"""Which family of kernels `auto` runs an op on.

The families have not been timed against each other yet (both pass their tests on an H100): the order on CUDA is the
compiled kernels first and Triton where an op lacks them, by expectation. A measured table is written from `python
-m bench ops --device cuda`: for each op the rows of one GPU from the fastest down, a comment with the GPU, the
commit and the two medians behind every limit. A row with limits holds for calls of that many steps, B * T; it is
passed over where the weights are packed, since they are packed before a call's size is known, so that every op
keeps a row without limits. `rvq_search` and `rvq_lookup` share one packed tensor: their rows without limits must
name one family.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Row:
    """A family, and the calls that it is good for."""

    backend: str
    min_steps: int = 0
    max_steps: int | None = None  # B * T

    @property
    def limited(self) -> bool:
        """Whether it holds for some sizes alone."""
        return self.min_steps > 0 or self.max_steps is not None

    def holds(self, steps: int | None) -> bool:
        """Return whether it holds for a call of so many steps; None: the size does not count."""
        if steps is None:
            return not self.limited
        return self.min_steps <= steps and (self.max_steps is None or steps <= self.max_steps)


HALVES = (torch.bfloat16, torch.float16)
DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "cpu": (torch.float32, torch.float64, *HALVES),
    "cuda": (torch.float32, *HALVES),
    "triton": (torch.float32, *HALVES),
}

# The ops of the Triton family. The inference program counts as one op: it runs where every op of it does.
TRITON_OPS = ("causal_dwconv1d", "rvq_lookup", "rvq_search", "snake_upsample1d")
ENGINE = "the inference program"

_BOTH = (Row("cuda"), Row("triton"))
_CUDA = (Row("cuda"),)

# On CUDA tensors, the best first; the reference stands behind all of them. On CPU tensors "cpu" is the only family.
AUTO: dict[str, tuple[Row, ...]] = {
    "causal_dwconv1d": _BOTH,
    "residual_unit": _CUDA,
    "rvq_lookup": _BOTH,
    "rvq_search": _BOTH,
    "snake_conv1d": _CUDA,
    "snake_upsample1d": _BOTH,
    ENGINE: _CUDA,
}


def by_size(op: str) -> bool:
    """Return whether the choice for an op looks at a call's size."""
    return any(row.limited for row in AUTO[op])
