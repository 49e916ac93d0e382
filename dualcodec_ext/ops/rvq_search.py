"""Residual vector quantisation: latent to codes, every stage in one call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import build, reference
from ._common import check_types, empty_signal, kernels_for, register


def rvq_search(
    z: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    codebooks: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    *,
    num_quantizers: int | None = None,
    return_quantized: bool = False,
    return_margin: bool = False,
    lengths: Tensor | None = None,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Code a latent: each stage takes the codebook row nearest by angle to what the stages before it left over.

    Args:
        z: [B, C, F] float32, float64, bfloat16 or float16, any strides.
        in_weight: [Q, D, C], projections into the code space, D in 1..64.
        in_bias: [Q, D].
        codebooks: [Q, N, D] un-normalised, N in 1..65536. Unequal code dims are padded with zeros to one D.
        out_weight: [Q, C, D], projections back.
        out_bias: [Q, C].
        num_quantizers: q, the stages to run, 1..Q; None: all.
        return_quantized: also return the sum over the stages of out_proj(row).
        return_margin: also return how clear each choice was.
        lengths: [B] int64, frames per item; past it codes, sum and margin are 0.
        packed: `ops.packing.pack_rvq(...)`; then of the weights the shapes alone are read.

    Returns:
        codes [B, q, F] int64; quantized [B, C, F], dtype and layout of z, or None; margin [B, q, F] float32 (float64
        for float64) or None: second smallest minus smallest squared distance, both L2-normalised (inf for N = 1).

    Raises:
        ValueError: a wrong shape, dtype or range; one line.
        RuntimeError: in the backward pass: it has no gradient, train through `reference.ResidualVectorQuantize`.

    Numerics: on the CPU the codes of a float32, bfloat16 or float16 z are those of the float64 definition with the
        weights as float32 holds them: float32 searches, and a code whose margin is below the error bound of that search
        is redone in float64 (its margin too); `rvq_search_stats` counts them. On a GPU the search is float32. Of equal
        scores the lowest index wins. A frame with a NaN gets codes 0 and a NaN sum. Bits depend neither on the batch
        nor on the number of threads.

    Source: kernels/rvq_search; defined by `reference.rvq_search_ref`.
    """
    needed = {"z": z, "in_weight": in_weight, "in_bias": in_bias, "codebooks": codebooks}
    needed |= {"out_weight": out_weight, "out_bias": out_bias}
    check_types("rvq_search", needed, {"lengths": lengths})
    stages = codebooks.shape[0] if num_quantizers is None else num_quantizers
    check_types("rvq_search", {}, {}, num_quantizers=stages)
    kernels = kernels_for("rvq_search", z, packed)
    if kernels is None:
        return reference.rvq_search_ref(
            z,
            in_weight,
            in_bias,
            codebooks,
            out_weight,
            out_bias,
            stages,
            return_quantized=return_quantized,
            return_margin=return_margin,
            lengths=lengths,
        )
    codes, quantized, margin = kernels.rvq_search(
        z,
        in_weight,
        in_bias,
        codebooks,
        out_weight,
        out_bias,
        stages,
        return_quantized,
        return_margin,
        lengths,
        packed,
    )
    return codes, quantized if return_quantized else None, margin if return_margin else None


class RvqSearchStats(NamedTuple):
    """How many codes `rvq_search` has searched for on the CPU, and how many of them it redid in float64."""

    codes: int
    redone: int


def rvq_search_stats(reset: bool = False) -> RvqSearchStats:
    """Count the codes that were searched for on the CPU, in this process, since the last reset.

    A code is one frame at one stage; frames past an item's length and those of a float64 z are not counted. Safe to
    call while other threads search.

    Args:
        reset: start again from zero.

    Returns:
        `codes` and, among them, `redone`: those that float32 could not decide and float64 did.

    Raises:
        ValueError: reset is no bool.
    """
    if not isinstance(reset, bool):
        raise ValueError(f"rvq_search_stats: reset must be True or False, got {reset!r}")
    module = build.load_module()
    return RvqSearchStats(0, 0) if module is None else RvqSearchStats(*module.rvq_search_counts(reset))


def _fake(
    z: Tensor,
    in_weight: Any,
    in_bias: Any,
    codebooks: Any,
    out_weight: Any,
    out_bias: Any,
    num_quantizers: int,
    return_quantized: bool,
    return_margin: bool,
    lengths: Any,
    packed: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (z.shape[0], num_quantizers, z.shape[2])
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    codes = z.new_empty(shape, dtype=torch.int64)
    quantized = empty_signal(z, z.shape[1], z.shape[2]) if return_quantized else z.new_empty(0)
    return codes, quantized, z.new_empty(shape if return_margin else (0,), dtype=dtype)


register("rvq_search", _fake, None, tensors=())
