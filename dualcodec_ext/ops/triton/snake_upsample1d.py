"""Host side of snake_upsample1d; the contract is `ops.snake_upsample1d`'s."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dualcodec_ext.kernels.snake_upsample1d import snake_upsample1d_triton as kernel

from . import _host as host


def _check_layer(op: str, weight: Tensor, stride: int, mode: str, padding: Sequence[int]) -> tuple[int, int]:
    """Return (Cin, Cout) of the weight, whose layout the mode decides."""
    host.check(mode in ("transposed", "repeat"), op, f"mode must be 'transposed' or 'repeat', got '{mode}'")
    host.check(stride >= 1, op, f"stride must be at least 1, got {stride}")
    host.check_padding(op, padding)
    fine = weight.dim() == 3 and weight.shape[2] == 2 * stride and weight.numel() > 0
    needed = "[Cin, Cout, 2 * stride]" if mode == "transposed" else "[Cout, Cin, 2 * stride]"
    host.check(fine, op, f"weight must be {needed} with stride {stride}, got {list(weight.shape)}")
    host.check_float(op, "weight", weight)
    first, second = weight.shape[:2]
    return (first, second) if mode == "transposed" else (second, first)


def _fold(weight: Tensor, stride: int, mode: str) -> Tensor:
    """Return [taps * Cin, S * Cout], float32 or the weight's half: the taps on a frame, by phase, added in float64.

    Outputs are counted from the first that the uncropped, unpadded upsampling has, so that all phases read the same
    frames: (q - 1, q) when transposed, (q, q + 1, q + 2) when repeat, whose phase 0 has no third tap.
    """
    wide = weight.detach().double()
    if mode == "transposed":
        folded = torch.stack([wide[..., stride:], wide[..., :stride]]).permute(0, 1, 3, 2)  # [taps, Cin, S, Cout]
    else:
        folded = wide.new_zeros(3, wide.shape[1], stride, wide.shape[0])
        for phase in range(stride):
            for k in range(2 * stride):
                folded[(phase + k) // stride, :, phase] += wide[..., k].t()
    taps, channels, _, columns = folded.shape
    dtype = weight.dtype if weight.dtype in (torch.bfloat16, torch.float16) else torch.float32
    return folded.reshape(taps * channels, stride * columns).to(dtype).contiguous()


def pack_upsample1d(weight: Tensor, stride: int, mode: str, padding: Sequence[int], winograd: int = 0) -> Tensor:
    """Return the folded weight; the padding does not change it."""
    host.check(winograd == 0, "pack_upsample1d", f"winograd must be 0 in Triton, got {winograd}")
    _check_layer("pack_upsample1d", weight, stride, mode, padding)
    return _fold(weight, stride, mode)


def snake_upsample1d(
    x: Tensor,
    alpha: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    mode: str,
    padding: Sequence[int],
    lengths: Tensor | None,
    packed: Tensor | None,
    winograd: int = 0,
) -> Tensor:
    """Check, allocate, launch."""
    op = "snake_upsample1d"
    host.check(winograd == 0, op, f"winograd must be 0 in Triton, got {winograd}")
    host.check_signal(op, "x", x)
    in_channels, out_channels = _check_layer(op, weight, stride, mode, padding)
    batch, channels, steps = x.shape
    host.check(in_channels == channels, op, f"weight must have Cin = {channels} as x does, got {list(weight.shape)}")
    host.check_shape(op, "weight", weight, weight.shape, "of three dims", x)
    lengths = host.check_lengths(op, lengths, batch, steps, x)
    if alpha is None:  # its Snake is x
        alpha = x.new_zeros(channels, dtype=torch.float32)
    host.check_shape(op, "alpha", alpha, [channels], "[C]", x)
    if bias is not None:
        host.check_shape(op, "bias", bias, [out_channels], "[C]", x)
    transposed = mode == "transposed"
    shape = [(2 if transposed else 3) * in_channels, stride * out_channels]
    if packed is None:
        folded = _fold(weight, stride, mode)
    else:
        dtypes = (torch.float32,) if x.dtype == torch.float32 else (torch.float32, x.dtype)
        folded = host.check_packed(op, packed, shape, x, dtypes)

    # Output n is output n + shift of the uncropped, unpadded upsampling.
    shift = padding[0] if transposed else -padding[0]
    extra = stride - sum(padding) if transposed else sum(padding) + 1 - 2 * stride
    out_steps = 0 if steps == 0 else max(0, steps * stride + extra)
    y = host.empty_signal(batch, out_channels, out_steps, x, host.is_channels_last(x))
    if y.numel() == 0:
        return y
    alphas = alpha.detach().float().contiguous()
    biases = torch.zeros(out_channels, device=x.device) if bias is None else bias.detach().float().contiguous()
    wide = x.dtype == torch.float32
    tf32 = wide and x.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    constants = kernel.constants(mode, stride, in_channels, out_channels, wide)
    first_frame, remainder = shift // stride, shift % stride
    rows = (out_steps - 1 + shift) // stride - first_frame + 1
    tiles = host.blocks(rows, constants["BLOCK_M"])
    short = constants["SHORT"]
    columns = host.blocks(short, constants["BLOCK_N"]) + host.blocks(
        stride * out_channels - short, constants["BLOCK_N"]
    )
    host.launch(
        kernel.snake_upsample1d_kernel,
        (batch * tiles, columns),
        x.device,
        x.detach(),
        y,
        folded,
        biases,
        alphas,
        1.0 / (alphas + 1e-9),
        lengths,
        in_channels,
        out_channels,
        steps,
        out_steps,
        extra,
        first_frame,
        remainder,
        tiles,
        *x.stride(),
        *y.stride(),
        HAS_LENGTHS=lengths is not None,
        PRECISION="tf32" if tf32 else "ieee",
        **constants,
    )
    return y
