"""Depthwise convolution with an optional LayerNorm behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import reference
from ._common import as_dtype, check_pair, check_types, conv_steps, empty_signal, kernels_for, register, register_out


def causal_dwconv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding: Sequence[int] | None = None,
    ln_weight: Tensor | None = None,
    ln_bias: Tensor | None = None,
    eps: float = 1e-6,
    lengths: Tensor | None = None,
) -> Tensor:
    """Convolve every channel with its own taps, then normalise over channels when `ln_weight` is given.

    Args:
        x: [B, C, T] float32, float64, bfloat16 or float16, any strides; stride 1 on C runs and stays channels-last.
        weight: [C, K], K in 1..64.
        bias: [C].
        padding: zeros to the left and right; None: (K - 1, 0), causal.
        ln_weight: [C], LayerNorm's scale; None: no LayerNorm.
        ln_bias: [C].
        eps: added to LayerNorm's variance.
        lengths: [B] int64, samples per item; those past it count as zero on input and output.

    Returns:
        [B, C, T + left + right - K + 1], dtype and layout of x.

    Raises:
        ValueError: a wrong shape, dtype or range; one line.

    Numerics: float32 accumulation (float64 for float64); the variance is taken in a second pass. Bits depend neither on
        the batch nor on the number of threads.

    Source: kernels/causal_dwconv1d; defined by `reference.causal_dwconv1d_ref`.
    """
    optional = {"bias": bias, "ln_weight": ln_weight, "ln_bias": ln_bias, "lengths": lengths}
    check_types("causal_dwconv1d", {"x": x, "weight": weight}, optional)
    pair = [weight.shape[-1] - 1, 0] if padding is None else check_pair("causal_dwconv1d", padding)
    kernels = kernels_for("causal_dwconv1d", x)
    if kernels is None:
        weight, bias, ln_weight, ln_bias = as_dtype(x.dtype, weight, bias, ln_weight, ln_bias)
        return reference.causal_dwconv1d_ref(x, weight, bias, (pair[0], pair[1]), ln_weight, ln_bias, eps, lengths)
    return kernels.causal_dwconv1d(x, weight, bias, pair, ln_weight, ln_bias, eps, lengths)


def _fake(
    x: Tensor, weight: Tensor, bias: Any, padding: Any, ln_weight: Any, ln_bias: Any, eps: Any, lengths: Any
) -> Tensor:
    return empty_signal(x, x.shape[1], conv_steps(x.shape[2], weight.shape[1], 1, 1, padding))


register("causal_dwconv1d", _fake, reference.causal_dwconv1d_ref, tensors=(0, 1, 2, 4, 5))
register_out("causal_dwconv1d")
