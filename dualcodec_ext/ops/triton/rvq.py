"""A quantiser's weights as the Triton kernels of rvq_search and rvq_lookup read them.

Packed, they are one float32 tensor [1, total] whose parts begin at multiples of 16 elements.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _host as host

_MAX_CODE_DIM = 64
_MAX_ENTRIES = 65536
_ALIGN = 16


def shapes(stages: int, entries: int, dim: int, channels: int) -> dict[str, tuple[int, ...]]:
    """Return the parts in their order."""
    return {
        "in_weight": (stages, channels, dim),
        "in_bias": (stages, dim),  # less W_i sum_{j<i} out_bias_j
        "cross": (stages, stages, dim, dim),  # W_i V_j for j < i, [.., column of V_j, row of W_i]
        "book": (stages, dim, entries),  # normalised rows
        "squares": (stages, entries),  # of the normalised rows
        "rows": (stages, entries, dim),  # as they are
        "out_weight": (stages, dim, channels),
        "out_bias": (stages, channels),  # summed over the stages up to and with each
    }


def total(parts: dict[str, tuple[int, ...]]) -> int:
    """Return the elements of a packed tensor."""
    return sum(host.blocks(math.prod(shape), _ALIGN) * _ALIGN for shape in parts.values())


def check_quantizer(
    op: str, codebooks: Tensor, out_weight: Tensor, out_bias: Tensor, like: Tensor
) -> tuple[int, int, int, int]:
    """Return (stages, entries, dim, channels)."""
    host.check(codebooks.dim() == 3, op, f"codebooks must be [Q, N, D], got {list(codebooks.shape)}")
    host.check(out_weight.dim() == 3, op, f"out_weight must be [Q, C, D], got {list(out_weight.shape)}")
    (stages, entries, dim), channels = codebooks.shape, out_weight.shape[1]
    fine = stages >= 1 and 1 <= entries <= _MAX_ENTRIES and 1 <= dim <= _MAX_CODE_DIM
    needed = f"codebooks must be [Q >= 1, N in 1..{_MAX_ENTRIES}, D in 1..{_MAX_CODE_DIM}]"
    host.check(fine, op, f"{needed}, got {list(codebooks.shape)}")
    host.check(channels >= 1, op, f"out_weight must have at least one channel, got {list(out_weight.shape)}")
    host.check_shape(op, "codebooks", codebooks, codebooks.shape, "[Q, N, D]", like)
    host.check_shape(op, "out_weight", out_weight, [stages, channels, dim], "[Q, C, D]", like)
    host.check_shape(op, "out_bias", out_bias, [stages, channels], "[Q, C]", like)
    return stages, entries, dim, channels


def check_input(op: str, in_weight: Tensor, in_bias: Tensor, sizes: tuple[int, int, int, int], like: Tensor) -> None:
    """Check the projections into the code space."""
    stages, _, dim, channels = sizes
    host.check_shape(op, "in_weight", in_weight, [stages, dim, channels], "[Q, D, C]", like)
    host.check_shape(op, "in_bias", in_bias, [stages, dim], "[Q, D]", like)


@torch.no_grad()
def pack_rvq(in_weight: Tensor, in_bias: Tensor, codebooks: Tensor, out_weight: Tensor, out_bias: Tensor) -> Tensor:
    """Compute the parts in float64 and round them once; the result follows from the weights alone."""
    op = "pack_rvq"
    sizes = check_quantizer(op, codebooks, out_weight, out_bias, codebooks)
    check_input(op, in_weight, in_bias, sizes, codebooks)
    stages = sizes[0]
    w, a, books, v, b = (t.double() for t in (in_weight, in_bias, codebooks, out_weight, out_bias))
    earlier = torch.cumsum(b, 0) - b  # [Q, C]: the biases that are in the residual before each stage
    norms = books.square().sum(2, keepdim=True).sqrt().clamp(min=1e-12)
    normalised = (books / norms).float()
    cross = torch.einsum("idc,jck->ijkd", w, v)
    cross *= torch.ones(stages, stages, dtype=torch.float64, device=w.device).tril(-1)[:, :, None, None]
    parts = {
        "in_weight": w.transpose(1, 2),
        "in_bias": a - torch.einsum("idc,ic->id", w, earlier),
        "cross": cross,
        "book": normalised.transpose(1, 2),
        "squares": normalised.double().square().sum(2),
        "rows": books,
        "out_weight": v.transpose(1, 2),
        "out_bias": torch.cumsum(b, 0),
    }
    layout = shapes(*sizes)
    packed = torch.zeros(1, total(layout), dtype=torch.float32, device=codebooks.device)
    for name, view in _views(packed, layout).items():
        view.copy_(parts[name])
    return packed


def _views(packed: Tensor, layout: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    views, begin = {}, 0
    for name, shape in layout.items():
        views[name] = packed[0].narrow(0, begin, math.prod(shape)).view(shape)
        begin += host.blocks(math.prod(shape), _ALIGN) * _ALIGN
    return views


def open_packed(op: str, packed: Tensor, sizes: tuple[int, int, int, int], like: Tensor) -> dict[str, Tensor]:
    """Return the parts of a packed tensor, which must be one for these sizes."""
    layout = shapes(*sizes)
    return _views(host.check_packed(op, packed, [1, total(layout)], like), layout)
