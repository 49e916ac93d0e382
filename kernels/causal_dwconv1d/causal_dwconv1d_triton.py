"""causal_dwconv1d in Triton."""

import triton
import triton.language as tl

from ..common.dtype_triton import round_to

_TILE = 4096  # elements that a program of 4 warps holds: 32 a thread leave registers for loads and 64-bit addresses
_WIDEST = 1024  # channels in one block; more of them go in narrower blocks, whose loop needs registers of its own


def constants(channels: int, taps: int, norm: bool) -> dict[str, int]:
    """Return the launch's constexprs, which follow from the layer alone."""
    block = min(triton.next_power_of_2(channels), 128)
    if norm:
        block = triton.next_power_of_2(channels) if channels <= _WIDEST else _WIDEST // 2
    return {
        "TAPS": taps,
        "NORM": norm,
        "BLOCK_T": min(32, _TILE // block) if not norm or channels <= _WIDEST else 4,
        "BLOCK_C": block,
        "C_BLOCKS": -(-channels // block) if norm else 1,
        "num_warps": 4,
        "enable_fp_fusion": True,
        "maxnreg": 255,  # ptxas would rather spill a word than give up another block on an SM
    }


@triton.jit
def _convolve(
    x,
    weight,
    bias,
    t,
    c,
    channels,
    valid,
    x_stride_c,
    x_stride_t,
    weight_stride_c,
    weight_stride_k,
    HAS_BIAS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return bias + the taps' sum [BLOCK_T, BLOCK_C]; t [BLOCK_T] is the step under the first tap, c the channels."""
    inside = c < channels
    acc = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    for k in range(TAPS):
        step = t + k
        mask = ((step >= 0) & (step < valid))[:, None] & inside[None, :]
        value = tl.load(x + step[:, None] * x_stride_t + c[None, :] * x_stride_c, mask=mask, other=0.0)
        w = tl.load(weight + c * weight_stride_c + tl.cast(k, tl.int64) * weight_stride_k, mask=inside, other=0.0)
        w = tl.broadcast_to(w.to(tl.float32)[None, :], (BLOCK_T, BLOCK_C))
        acc = tl.fma(value.to(tl.float32), w, acc)
    return acc


# A row is added in pairs of neighbours, then in pairs of those sums, ..: two addends have no order. Over more of them
# tl.sum adds in the order in which a tile lies in registers, which follows from x's strides and alignment.
@triton.jit
def _row_sum(h, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    for level in tl.static_range(BLOCK_C.bit_length() - 1):
        h = tl.sum(tl.reshape(h, [BLOCK_T, BLOCK_C >> (level + 1), 2]), axis=2)
    return tl.reshape(h, [BLOCK_T])


@triton.jit
def _square_sum(h, mean, c, channels, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    rest = tl.where((c < channels)[None, :], h - mean[:, None], 0.0)
    # Plain products the compiler could fuse into the first sums, one or the other of a pair.
    return _row_sum(tl.fma(rest, rest, tl.zeros([BLOCK_T, BLOCK_C], tl.float32)), BLOCK_T, BLOCK_C)


@triton.jit
def _normalise(h, mean, variance, eps, ln_weight, ln_bias, c, channels, HAS_LN_BIAS: tl.constexpr):
    inside = c < channels
    h = (h - mean[:, None]) * tl.div_rn(1.0, tl.sqrt_rn(variance + eps))[:, None]
    scale = tl.broadcast_to(tl.load(ln_weight + c, mask=inside, other=0.0).to(tl.float32)[None, :], h.shape)
    if HAS_LN_BIAS:
        shift = tl.broadcast_to(tl.load(ln_bias + c, mask=inside, other=0.0).to(tl.float32)[None, :], h.shape)
        return tl.fma(h, scale, shift)
    else:
        return h * scale


@triton.jit
def _store(h, y, t, c, channels, out_steps, out_valid, y_stride_c, y_stride_t):
    h = tl.where((t < out_valid)[:, None], h, 0.0)
    mask = (t < out_steps)[:, None] & (c < channels)[None, :]
    tl.store(y + t[:, None] * y_stride_t + c[None, :] * y_stride_c, round_to(h, y.dtype.element_ty), mask=mask)


# h[b, c, t] = bias[c] + sum_k weight[c, k] x[b, c, t - left + k]; y = LayerNorm over c of h where NORM, else h.
# A program owns BLOCK_T steps of a clip: with NORM all channels, in C_BLOCKS blocks that are convolved again for the
# mean, for the variance of what is left, and for the output; without NORM one block. float32 accumulation, the order
# of additions follows from channels and taps alone, not from strides or lengths. No alignment is needed; stride 1 on C
# loads whole lines.
@triton.jit
def causal_dwconv1d_kernel(
    x,  # [B, C, T] f32|f16|bf16
    y,  # [B, C, T'] as x
    weight,  # [C, K] f32|f16|bf16
    bias,  # [C]
    ln_weight,  # [C]
    ln_bias,  # [C]
    lengths,  # [B] i64
    channels,
    in_steps,
    out_steps,
    tiles,
    pad_left,
    extra_steps,
    eps,
    x_stride_b,
    x_stride_c,
    x_stride_t,
    y_stride_b,
    y_stride_c,
    y_stride_t,
    weight_stride_c,
    weight_stride_k,
    HAS_BIAS: tl.constexpr,
    HAS_LN_BIAS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    NORM: tl.constexpr,
    TAPS: tl.constexpr,
    C_BLOCKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b = (tl.program_id(0) // tiles).to(tl.int64)
    t = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c0 = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = tl.cast(in_steps, tl.int64)
    out_valid = tl.cast(out_steps, tl.int64)
    if HAS_LENGTHS:
        valid = tl.minimum(tl.maximum(tl.load(lengths + b), 0), valid)
        out_valid = tl.where(valid > 0, valid + extra_steps, 0)
    x += b * x_stride_b
    y += b * y_stride_b
    first = t - pad_left
    count = tl.cast(channels, tl.float32)

    if not NORM:
        h = _convolve(x, weight, bias, first, c0, channels, valid, x_stride_c, x_stride_t,
                      weight_stride_c, weight_stride_k, HAS_BIAS, TAPS, BLOCK_T, BLOCK_C)  # fmt: skip
        _store(h, y, t, c0, channels, out_steps, out_valid, y_stride_c, y_stride_t)
    elif C_BLOCKS == 1:
        h = _convolve(x, weight, bias, first, c0, channels, valid, x_stride_c, x_stride_t,
                      weight_stride_c, weight_stride_k, HAS_BIAS, TAPS, BLOCK_T, BLOCK_C)  # fmt: skip
        mean = tl.div_rn(_row_sum(h, BLOCK_T, BLOCK_C), count)
        squares = _square_sum(h, mean, c0, channels, BLOCK_T, BLOCK_C)
        h = _normalise(h, mean, tl.div_rn(squares, count), eps, ln_weight, ln_bias, c0, channels, HAS_LN_BIAS)
        _store(h, y, t, c0, channels, out_steps, out_valid, y_stride_c, y_stride_t)
    else:
        total = tl.zeros([BLOCK_T], tl.float32)
        for i in range(C_BLOCKS):
            h = _convolve(x, weight, bias, first, c0 + i * BLOCK_C, channels, valid, x_stride_c, x_stride_t,
                          weight_stride_c, weight_stride_k, HAS_BIAS, TAPS, BLOCK_T, BLOCK_C)  # fmt: skip
            total += _row_sum(h, BLOCK_T, BLOCK_C)
        mean = tl.div_rn(total, count)
        squares = tl.zeros([BLOCK_T], tl.float32)
        for i in range(C_BLOCKS):
            c = c0 + i * BLOCK_C
            h = _convolve(x, weight, bias, first, c, channels, valid, x_stride_c, x_stride_t,
                          weight_stride_c, weight_stride_k, HAS_BIAS, TAPS, BLOCK_T, BLOCK_C)  # fmt: skip
            squares += _square_sum(h, mean, c, channels, BLOCK_T, BLOCK_C)
        variance = tl.div_rn(squares, count)
        for i in range(C_BLOCKS):
            c = c0 + i * BLOCK_C
            h = _convolve(x, weight, bias, first, c, channels, valid, x_stride_c, x_stride_t,
                          weight_stride_c, weight_stride_k, HAS_BIAS, TAPS, BLOCK_T, BLOCK_C)  # fmt: skip
            h = _normalise(h, mean, variance, eps, ln_weight, ln_bias, c, channels, HAS_LN_BIAS)
            _store(h, y, t, c, channels, out_steps, out_valid, y_stride_c, y_stride_t)
