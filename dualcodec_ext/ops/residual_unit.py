"""The residual unit of encoder and decoder in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import reference
from ._common import (
    as_dtype,
    check_pair,
    check_types,
    conv_steps,
    empty_signal,
    kernels_for,
    kernels_for_pair,
    register,
    register_out,
)


def residual_unit(
    x: Tensor,
    alpha1: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    alpha2: Tensor,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    dilation: int = 1,
    padding: Sequence[int] | None = None,
    causal: bool = False,
    lengths: Tensor | None = None,
    packed: Tensor | None = None,
    winograd: int = 0,
    out_alpha: Tensor | None = None,
    snaked: Tensor | None = None,
) -> Tensor:
    """Snake, dilated convolution (k=7), Snake, 1x1 convolution, plus the input, in cache-sized tiles.

    Args:
        x: [B, C, T] float32, float64, bfloat16 or float16, any strides; stride 1 on C runs and stays channels-last.
        alpha1: [C], the first Snake's.
        weight1: [C, C, 7].
        bias1: [C] or None.
        alpha2: [C], the second Snake's.
        weight2: [C, C, 1].
        bias2: [C] or None.
        dilation: d, at least 1.
        padding: zeros to the left and right; None: (6d, 0) when causal, else (3d, 3d), which keep the length.
        causal: whether output t is aligned with the last tap (True) or the middle one.
        lengths: [B] int64, samples per item; those past it count as zero on input and output.
        packed: `ops.packing.pack_residual_unit(weight1, weight2, winograd)`; then of the weights the shapes alone are
            read.
        winograd: in how many [C, C] products m outputs, d steps apart, of the k=7 convolution are computed: 0, direct,
            7 for each; 13 for 4, about 1.6 times direct's rounding; 10 for 4, about 5 times; 22 for 12, about 2.2
            times. float32 and float64 on the CPU.
        out_alpha: [C]: the result goes through Snake too, behind its rounding; None: it does not. On CUDA and in plain
            PyTorch.
        snaked: [B, C, T] in x's dtype, x through the first Snake, where the layer in front has handed that on: it is
            read instead. On CUDA where two kernels compute the unit (float32, or C above 192), and in plain PyTorch.

    Returns:
        [B, C, T + left + right - 6d], dtype and layout of x. To output t is added x[t - left + (6d when causal,
        else 3d)], zero outside.

    Raises:
        ValueError: a wrong shape, dtype or range; one line.
        RuntimeError: a gradient is needed and `packed` is given.

    Numerics: float32 accumulation (float64 for float64), in an order that depends on C alone. On the CPU a bfloat16 x
        takes its weights in bfloat16. With `winograd` the outputs [m d g, m d g + m d) are one group: an output's
        bits, and whether it is NaN, depend on all inputs that its group reads. A signal cut at multiples of m d, with
        the context that the convolution needs, gives the same bits. The reference computes the same, directly,
        whatever `winograd` is.

    Source: kernels/residual_unit; defined by `reference.residual_unit_ref`.
    """
    needed = {"x": x, "alpha1": alpha1, "weight1": weight1, "alpha2": alpha2, "weight2": weight2}
    optional = {"bias1": bias1, "bias2": bias2, "lengths": lengths, "out_alpha": out_alpha, "snaked": snaked}
    check_types("residual_unit", needed, optional, dilation=dilation, winograd=winograd)
    tensors = (alpha1, weight1, bias1, alpha2, weight2, bias2)
    pair = _both_sides("residual_unit", padding, dilation, causal)
    kernels = kernels_for("residual_unit", x, packed)
    if kernels is None:
        tensors, out_alpha, snaked = _as_x(x, tensors, out_alpha, snaked)
        return reference.residual_unit_ref(x, *tensors, dilation, pair, causal, lengths, out_alpha, snaked)
    return kernels.residual_unit(x, *tensors, dilation, pair, causal, lengths, packed, winograd, out_alpha, snaked)


def residual_unit_pair(
    x: Tensor,
    alpha1: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    alpha2: Tensor,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    out_alpha: Tensor,
    dilation: int = 1,
    padding: Sequence[int] | None = None,
    causal: bool = False,
    lengths: Tensor | None = None,
    packed: Tensor | None = None,
    winograd: int = 0,
    snaked: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`residual_unit`, and the same through the first Snake of a unit behind: what that unit takes as x and `snaked`.

    Args:
        x, alpha1, weight1, bias1, alpha2, weight2, bias2, dilation, padding, causal, lengths, packed, winograd, snaked:
            as of `residual_unit`.
        out_alpha: [C], of the unit behind.

    Returns:
        What `residual_unit` returns without `out_alpha`, and with it.

    Raises:
        ValueError: a wrong shape, dtype or range, the CPU, or a unit that one kernel computes; one line.
        RuntimeError: a gradient is needed.

    Numerics: both have the bits that `residual_unit` gives each.

    Source: kernels/residual_unit; defined by `reference.residual_unit_pair_ref`.
    """
    needed = {
        "x": x,
        "alpha1": alpha1,
        "weight1": weight1,
        "alpha2": alpha2,
        "weight2": weight2,
        "out_alpha": out_alpha,
    }
    optional = {"bias1": bias1, "bias2": bias2, "lengths": lengths, "snaked": snaked}
    check_types("residual_unit_pair", needed, optional, dilation=dilation, winograd=winograd)
    tensors = (alpha1, weight1, bias1, alpha2, weight2, bias2)
    pair = _both_sides("residual_unit_pair", padding, dilation, causal)
    kernels = kernels_for_pair("residual_unit", x, packed)
    if kernels is None:
        tensors, out_alpha, snaked = _as_x(x, tensors, out_alpha, snaked)
        return reference.residual_unit_pair_ref(
            x, *tensors, dilation, pair, causal, lengths, out_alpha=out_alpha, snaked=snaked
        )
    y, y_snaked = kernels.residual_unit_pair(
        x, *tensors, dilation, pair, causal, lengths, packed, winograd, out_alpha, snaked
    )
    return y, y_snaked


_Tensors = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None]


def _as_x(x: Tensor, tensors: _Tensors, out_alpha: Any, snaked: Any) -> tuple[_Tensors, Any, Any]:
    """Return a unit's tensors, and what stands beside them, in x's dtype."""
    alpha1, weight1, bias1, alpha2, weight2, bias2 = as_dtype(x.dtype, *tensors)
    return (alpha1, weight1, bias1, alpha2, weight2, bias2), *as_dtype(x.dtype, out_alpha, snaked)


def _both_sides(op: str, padding: Sequence[int] | None, dilation: int, causal: bool) -> tuple[int, int]:
    if padding is None:
        return (6 * dilation, 0) if causal else (3 * dilation, 3 * dilation)
    left, right = check_pair(op, padding)
    return left, right


def _fake(
    x: Tensor,
    alpha1: Any,
    weight1: Tensor,
    bias1: Any,
    alpha2: Any,
    weight2: Any,
    bias2: Any,
    dilation: int,
    padding: Any,
    causal: Any,
    lengths: Any,
    packed: Any,
    winograd: int = 0,
    out_alpha: Any = None,
    snaked: Any = None,
) -> Tensor:
    return empty_signal(x, x.shape[1], conv_steps(x.shape[2], 7, 1, dilation, padding))


def _fake_pair(*args: Any) -> tuple[Tensor, Tensor]:
    return _fake(*args), _fake(*args)


def _reference(x: Tensor, *args: Any) -> Tensor:
    return reference.residual_unit_ref(x, *args[:10], *args[12:])


register("residual_unit", _fake, _reference, tensors=(0, 1, 2, 3, 4, 5, 6, 13, 14), packed=11)
register_out("residual_unit")
register("residual_unit_pair", _fake_pair, None, tensors=())
