"""Snake, then upsampling by a transposed or a nearest-repeat convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import reference
from ._common import (
    as_dtype,
    check_pair,
    check_types,
    empty_signal,
    kernels_for,
    kernels_for_pair,
    register,
    register_out,
    steps_or_none,
)


def snake_upsample1d(
    x: Tensor,
    alpha: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 2,
    mode: str = "transposed",
    padding: Sequence[int] = (0, 0),
    lengths: Tensor | None = None,
    packed: Tensor | None = None,
    winograd: int = 0,
) -> Tensor:
    """Apply Snake and upsample by `stride`, as one small convolution per output phase.

    Args:
        x: [B, Cin, T] float32, float64, bfloat16 or float16, any strides; stride 1 on Cin runs and stays channels-last.
        alpha: [Cin], Snake's; None: no Snake.
        weight: [Cin, Cout, 2 stride] when transposed, [Cout, Cin, 2 stride] when repeat.
        bias: [Cout].
        stride: S, at least 1.
        mode: "transposed" (ConvTranspose1d) or "repeat" (nearest-repeat by S, then a convolution).
        padding: (left, right): samples cropped off the (T + 1) S of the transposed convolution; or zeros put around the
            repeated signal.
        lengths: [B] int64, samples per item; those past it count as zero on input and output.
        packed: `ops.packing.pack_upsample1d(weight, stride, mode, padding, winograd)`; then of weight the shape alone
            is read.
        winograd: 0, direct; or, in float32 and float64 on the CPU, a form with fewer [Cin, Cout] products. When
            transposed 4: those that give a phase's outputs for 3 frames, where the direct form takes 6. When repeat 2:
            those of a phase and frame, for up to 3.

    Returns:
        [B, Cout, (T + 1) S - left - right] or [B, Cout, (T - 2) S + left + right + 1], dtype and layout of x.

    Raises:
        ValueError: a wrong shape, dtype or range; one line.
        RuntimeError: a gradient is needed and `packed` is given.

    Numerics: float32 accumulation (float64 for float64); taps of a repeat that meet are added in float64 when packing.
        On the CPU a bfloat16 x takes its weights in bfloat16. With winograd = 4 the outputs [3S * g, 3S * g + 3S) are
        one group: an output's bits, and whether it is NaN, depend on all inputs that its group reads. A signal cut at
        multiples of 3S gives the same bits. With 2 a phase is a sum over the phases between it and one of them, so that
        it may be NaN where that one is. The reference computes the same, directly, whatever `winograd` is.

    Source: kernels/snake_upsample1d; defined by `reference.snake_upsample1d_ref`.
    """
    optional = {"alpha": alpha, "bias": bias, "lengths": lengths}
    check_types("snake_upsample1d", {"x": x, "weight": weight}, optional, stride=stride, winograd=winograd)
    pair = check_pair("snake_upsample1d", padding)
    kernels = kernels_for("snake_upsample1d", x, packed)
    if kernels is None:
        alpha, weight, bias = as_dtype(x.dtype, alpha, weight, bias)
        return reference.snake_upsample1d_ref(x, alpha, weight, bias, stride, mode, (pair[0], pair[1]), lengths)
    return kernels.snake_upsample1d(x, alpha, weight, bias, stride, mode, pair, lengths, packed, winograd)


def snake_upsample1d_pair(
    x: Tensor,
    alpha: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out_alpha: Tensor,
    stride: int = 2,
    mode: str = "transposed",
    padding: Sequence[int] = (0, 0),
    lengths: Tensor | None = None,
    packed: Tensor | None = None,
    winograd: int = 0,
) -> tuple[Tensor, Tensor]:
    """`snake_upsample1d`, and the same through the first Snake of a `residual_unit` behind: its x and `snaked`.

    Args:
        x, alpha, weight, bias, stride, mode, padding, lengths, packed, winograd: as of `snake_upsample1d`.
        out_alpha: [Cout], of the unit behind.

    Returns:
        What `snake_upsample1d` returns, and Snake of that, rounded again.

    Raises:
        ValueError: a wrong shape, dtype or range, or the CPU; one line.
        RuntimeError: a gradient is needed.

    Numerics: the bits of `snake_upsample1d`, and those that the unit's own Snake would give.

    Source: kernels/snake_upsample1d; defined by `reference.snake_upsample1d_pair_ref`.
    """
    optional = {"alpha": alpha, "bias": bias, "lengths": lengths}
    needed = {"x": x, "weight": weight, "out_alpha": out_alpha}
    check_types("snake_upsample1d_pair", needed, optional, stride=stride, winograd=winograd)
    left, right = check_pair("snake_upsample1d_pair", padding)
    kernels = kernels_for_pair("snake_upsample1d", x, packed)
    if kernels is None:
        alpha, weight, bias, out_alpha = as_dtype(x.dtype, alpha, weight, bias, out_alpha)
        return reference.snake_upsample1d_pair_ref(
            x, alpha, weight, bias, stride, mode, (left, right), lengths, out_alpha=out_alpha
        )
    y, y_snaked = kernels.snake_upsample1d_pair(
        x, alpha, weight, bias, stride, mode, (left, right), lengths, packed, winograd, out_alpha
    )
    return y, y_snaked


def _fake(
    x: Tensor,
    alpha: Any,
    weight: Tensor,
    bias: Any,
    stride: int,
    mode: str,
    padding: Any,
    lengths: Any,
    packed: Any,
    winograd: int = 0,
) -> Tensor:
    steps, repeat = x.shape[2], mode == "repeat"
    pad = padding[0] + padding[1]
    out = (steps - 2) * stride + pad + 1 if repeat else (steps + 1) * stride - pad
    return empty_signal(x, weight.shape[0] if repeat else weight.shape[1], steps_or_none(steps, out))


def _reference(x: Tensor, *args: Any) -> Tensor:
    return reference.snake_upsample1d_ref(x, *args[:7])


def _fake_pair(*args: Any) -> tuple[Tensor, Tensor]:
    return _fake(*args[:-1]), _fake(*args[:-1])


register("snake_upsample1d", _fake, _reference, tensors=(0, 1, 2, 3), packed=8)
register_out("snake_upsample1d")
register("snake_upsample1d_pair", _fake_pair, None, tensors=())
