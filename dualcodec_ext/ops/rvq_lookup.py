"""Codes back to a latent."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..reference.ops import mask_past_lengths
from ._common import check_types, empty_signal, kernels_for, register, register_out


def rvq_lookup(
    codes: Tensor,
    codebooks: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    addend: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    channels_last: bool = False,
    packed: Tensor | None = None,
) -> Tensor:
    """Sum the output projections of the rows that codes name, for any prefix of the stages.

    Args:
        codes: [B, q, F] integers in [0, N), q in 1..Q: the first q stages.
        codebooks: [Q, N, D] un-normalised.
        out_weight: [Q, C, D].
        out_bias: [Q, C].
        addend: [B, C, F] float32, float64, bfloat16 or float16, added to the sum.
        lengths: [B] int64, frames per item; codes past it are not looked at, the result there is 0.
        channels_last: lay the result out with stride 1 on C, where there is no addend.
        packed: `ops.packing.pack_rvq(...)`; then of the weights the shapes alone are read.

    Returns:
        [B, C, F] in the dtype and layout of addend, or the dtype of out_weight.

    Raises:
        ValueError: a code out of range (its stage, position and the range are named), a wrong shape or dtype; one line.
            On a GPU the call waits for the codes to be checked; while a CUDA graph is captured it does not, and frames
            with such a code are NaN.
        RuntimeError: a gradient is needed and `packed` is given.

    Numerics: float32 accumulation (float64 for float64).

    Source: kernels/rvq_lookup; defined by `reference.rvq_lookup_ref`.
    """
    needed = {"codes": codes, "codebooks": codebooks, "out_weight": out_weight, "out_bias": out_bias}
    check_types("rvq_lookup", needed, {"addend": addend, "lengths": lengths})
    like = out_weight if addend is None else addend
    kernels = kernels_for("rvq_lookup", like, packed, codes)
    if kernels is None:
        return reference.rvq_lookup_ref(codes, codebooks, out_weight, out_bias, addend, lengths)
    return kernels.rvq_lookup(codes, codebooks, out_weight, out_bias, addend, lengths, channels_last, packed)


def _fake(
    codes: Tensor,
    codebooks: Any,
    out_weight: Tensor,
    out_bias: Any,
    addend: Tensor | None,
    lengths: Any,
    channels_last: bool,
    packed: Any,
) -> Tensor:
    if addend is not None:
        return empty_signal(addend, addend.shape[1], addend.shape[2])
    batch, channels, frames = codes.shape[0], out_weight.shape[1], codes.shape[2]
    if channels_last:
        return out_weight.new_empty(batch, frames, channels).transpose(1, 2)
    return out_weight.new_empty(batch, channels, frames)


def _differentiable(
    codes: Tensor,
    codebooks: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    addend: Tensor | None,
    lengths: Tensor | None,
    channels_last: bool,
    packed: Tensor | None,
) -> Tensor:
    # rvq_lookup_ref without its check of the codes: the forward has made it, and a tracer can't look at values.
    codes = mask_past_lengths(codes, lengths).long()
    rows = torch.stack([F.embedding(codes[:, i], codebooks[i]) for i in range(codes.shape[1])], 1)  # [B, q, F, D]
    stages = codes.shape[1]
    total = torch.einsum("bqfd,qcd->bcf", rows, out_weight[:stages]) + out_bias[:stages].sum(0)[:, None]
    return mask_past_lengths(total if addend is None else total + addend, lengths)


register("rvq_lookup", _fake, _differentiable, tensors=(1, 2, 3, 4), packed=7)
register_out("rvq_lookup")
