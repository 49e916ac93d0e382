"""snake_upsample1d in Triton."""

import triton
import triton.language as tl

from ..common.dtype_triton import accumulate, round_to
from ..common.snake_triton import snake


def constants(mode: str, stride: int, in_channels: int, out_channels: int, wide: bool) -> dict[str, int]:
    """Return the launch's constexprs, which follow from the layer and its dtype (wide: float32) alone."""
    columns = triton.next_power_of_2(stride * out_channels)
    # ptxas would rather spill a word than give up a second block on an SM.
    limits = {"num_warps": 4, "num_stages": 2} if wide else {"num_warps": 8, "num_stages": 3}
    return {
        "UP": stride,
        "FIRST": -1 if mode == "transposed" else 0,
        "SHORT": (stride if mode == "transposed" else 1) * out_channels,
        "BLOCK_M": 64,
        "BLOCK_N": min(64 if wide else 128, max(16, columns)),
        "BLOCK_K": min(16 if wide else 32, max(16, triton.next_power_of_2(in_channels))),
        "enable_fp_fusion": True,
        "maxnreg": 255,
        **limits,
    }


# y[b, co, r S + p - rem] = bias[co] + sum_j sum_c W[j, c, p, co] snake(x[b, c, q0 + r + FIRST + j]).
# One GEMM: a row is a frame r, a column a phase and a channel (p, co), so that a row's columns are S output steps.
# A program owns BLOCK_M rows of a clip by BLOCK_N columns. The first SHORT columns have two taps, those behind them
# three; a block never holds both, so nothing is multiplied by a tap that a phase lacks. Operands in x's dtype (float32:
# ieee unless tf32 is asked for), float32 accumulation in an order that follows from the layer. No alignment is needed.
@triton.jit
def snake_upsample1d_kernel(
    x,  # [B, Cin, T] f32|f16|bf16
    y,  # [B, Cout, T'] as x
    weight,  # [taps, Cin, S, Cout] f32|f16|bf16
    bias,  # [Cout] f32
    alpha,  # [Cin] f32
    inverse,  # [Cin] f32: 1 / (alpha + 1e-9)
    lengths,  # [B] i64
    in_channels,
    out_channels,
    in_steps,
    out_steps,
    extra_steps,
    row_frame,
    remainder,
    tiles,
    x_stride_b,
    x_stride_c,
    x_stride_t,
    y_stride_b,
    y_stride_c,
    y_stride_t,
    HAS_LENGTHS: tl.constexpr,
    PRECISION: tl.constexpr,
    UP: tl.constexpr,
    FIRST: tl.constexpr,
    SHORT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    b = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    short_blocks = (SHORT + BLOCK_N - 1) // BLOCK_N
    block = tl.program_id(1)
    columns = UP * out_channels
    is_short = block < short_blocks
    column = tl.where(is_short, block * BLOCK_N, SHORT + (block - short_blocks) * BLOCK_N) + tl.arange(0, BLOCK_N)
    column_ok = column < tl.where(is_short, SHORT, columns)
    taps = tl.where(is_short, 2, 3)
    valid = tl.cast(in_steps, tl.int64)
    out_valid = tl.cast(out_steps, tl.int64)
    if HAS_LENGTHS:
        valid = tl.minimum(tl.maximum(tl.load(lengths + b), 0), valid)
        out_valid = tl.where(valid > 0, valid * UP + extra_steps, 0)
    x += b * x_stride_b
    y += b * y_stride_b

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    blocks = (in_channels + BLOCK_K - 1) // BLOCK_K
    for k in range(taps * blocks):
        tap = k // blocks
        c = (k % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = c < in_channels
        frame = row + (row_frame + FIRST + tap)
        mask = ((frame >= 0) & (frame < valid))[:, None] & inside[None, :]
        at = x + frame[:, None] * x_stride_t + c.to(tl.int64)[None, :] * x_stride_c
        value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        a = tl.load(alpha + c, mask=inside, other=0.0)
        i = tl.load(inverse + c, mask=inside, other=0.0)
        value = snake(value, tl.broadcast_to(a[None, :], value.shape), tl.broadcast_to(i[None, :], value.shape))
        line = (tap * in_channels + c).to(tl.int64) * columns
        w = tl.load(weight + line[:, None] + column[None, :], mask=inside[:, None] & column_ok[None, :], other=0.0)
        value, w = round_to(value, x.dtype.element_ty), w.to(x.dtype.element_ty)
        acc = accumulate(value, w, acc, PRECISION)

    phase = column // out_channels
    channel = column % out_channels
    acc += tl.load(bias + channel, mask=column_ok, other=0.0)[None, :]
    # Sums of a row's and a column's part, so that 64-bit addresses need no registers of their own until they are used.
    begin = row * UP
    offset = phase.to(tl.int64) - remainder
    acc = tl.where(offset[None, :] < (out_valid - begin)[:, None], acc, 0.0)
    at = (y + begin * y_stride_t)[:, None] + (offset * y_stride_t + channel.to(tl.int64) * y_stride_c)[None, :]
    mask = (offset[None, :] >= -begin[:, None]) & (offset[None, :] < (out_steps - begin)[:, None])
    tl.store(at, round_to(acc, y.dtype.element_ty), mask=mask & column_ok[None, :])
