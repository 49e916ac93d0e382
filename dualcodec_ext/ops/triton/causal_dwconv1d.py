"""Host side of causal_dwconv1d; the contract is `ops.causal_dwconv1d`'s."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dualcodec_ext.kernels.causal_dwconv1d import causal_dwconv1d_triton as kernel

from . import _host as host

_MAX_TAPS = 64


def causal_dwconv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    lengths: Tensor | None,
) -> Tensor:
    """Check, allocate, launch."""
    op = "causal_dwconv1d"
    host.check_signal(op, "x", x)
    batch, channels, steps = x.shape
    host.check(channels > 0, op, f"x must have at least one channel, got {list(x.shape)}")
    fine = weight.dim() == 2 and weight.shape[0] == channels and 1 <= weight.shape[1] <= _MAX_TAPS
    needed = f"weight must be [C, K] with C = {channels} and K in 1..{_MAX_TAPS}"
    host.check(fine, op, f"{needed}, got {list(weight.shape)}")
    host.check_shape(op, "weight", weight, weight.shape, "[C, K]", x)
    host.check_padding(op, padding)
    host.check(ln_weight is not None or ln_bias is None, op, "ln_bias must come with ln_weight, got ln_bias alone")
    lengths = host.check_lengths(op, lengths, batch, steps, x)
    bias = host.vector(op, "bias", bias, channels, x)
    ln_weight = host.vector(op, "ln_weight", ln_weight, channels, x)
    ln_bias = host.vector(op, "ln_bias", ln_bias, channels, x)

    extra = sum(padding) - weight.shape[1] + 1
    out_steps = 0 if steps == 0 else max(0, steps + extra)
    y = host.empty_signal(batch, channels, out_steps, x, host.is_channels_last(x))
    if y.numel() == 0:
        return y
    constants = kernel.constants(channels, weight.shape[1], ln_weight is not None)
    tiles = host.blocks(out_steps, constants["BLOCK_T"])
    columns = 1 if ln_weight is not None else host.blocks(channels, constants["BLOCK_C"])
    host.launch(
        kernel.causal_dwconv1d_kernel,
        (batch * tiles, columns),
        x.device,
        x.detach(),
        y,
        weight.detach(),
        bias,
        ln_weight,
        ln_bias,
        lengths,
        channels,
        steps,
        out_steps,
        tiles,
        padding[0],
        extra,
        eps,
        *x.stride(),
        *y.stride(),
        *weight.stride(),
        HAS_BIAS=bias is not None,
        HAS_LN_BIAS=ln_bias is not None,
        HAS_LENGTHS=lengths is not None,
        **constants,
    )
    return y
