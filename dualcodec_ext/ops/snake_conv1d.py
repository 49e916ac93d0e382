"""Snake, convolution, activation and residual in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import reference
from ._common import as_dtype, check_pair, check_types, conv_steps, empty_signal, kernels_for, register, register_out


def snake_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    alpha: Tensor | None = None,
    *,
    stride: int = 1,
    dilation: int = 1,
    padding: Sequence[int] = (0, 0),
    activation: str = "none",
    residual: Tensor | None = None,
    lengths: Tensor | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """Apply Snake (when `alpha` is given), convolve, apply an activation, add a residual.

    Args:
        x: [B, Cin, T] float32, float64, bfloat16 or float16, any strides; stride 1 on Cin runs and stays channels-last.
        weight: [Cout, Cin, K].
        bias: [Cout].
        alpha: [Cin], Snake's; None: no Snake.
        stride: at least 1.
        dilation: at least 1.
        padding: zeros to the left and right of the snaked input.
        activation: "none", "tanh" or "gelu" (the erf form).
        residual: [B, Cout, T'], added last.
        lengths: [B] int64, samples per item; those past it count as zero on input and output.
        packed: `ops.packing.pack_conv1d(weight, stride, dilation)`, which saves packing at every call; then of weight
            the shape alone is read.

    Returns:
        [B, Cout, T'], T' = (T + left + right - (K - 1) dilation - 1) // stride + 1, dtype and layout of x.

    Raises:
        ValueError: a wrong shape, dtype or range; one line.
        RuntimeError: a gradient is needed and `packed` is given.

    Numerics: float32 accumulation (float64 for float64), in an order that depends on the weight's shape alone.
        On the CPU a bfloat16 x takes its weights in bfloat16.

    Source: kernels/snake_conv1d; defined by `reference.snake_conv1d_ref`.
    """
    optional = {"bias": bias, "alpha": alpha, "residual": residual, "lengths": lengths}
    check_types("snake_conv1d", {"x": x, "weight": weight}, optional, stride=stride, dilation=dilation)
    pair = check_pair("snake_conv1d", padding)
    kernels = kernels_for("snake_conv1d", x, packed)
    if kernels is None:
        weight, bias, alpha, residual = as_dtype(x.dtype, weight, bias, alpha, residual)
        return reference.snake_conv1d_ref(
            x, weight, bias, alpha, stride, dilation, (pair[0], pair[1]), activation, residual, lengths
        )
    return kernels.snake_conv1d(x, weight, bias, alpha, stride, dilation, pair, activation, residual, lengths, packed)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    alpha: Any,
    stride: int,
    dilation: int,
    padding: Any,
    activation: Any,
    residual: Any,
    lengths: Any,
    packed: Any,
) -> Tensor:
    return empty_signal(x, weight.shape[0], conv_steps(x.shape[2], weight.shape[2], stride, dilation, padding))


def _reference(x: Tensor, *args: Any) -> Tensor:
    return reference.snake_conv1d_ref(x, *args[:-1])


register("snake_conv1d", _fake, _reference, tensors=(0, 1, 2, 3, 8), packed=10)
register_out("snake_conv1d")
