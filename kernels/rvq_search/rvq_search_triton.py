"""rvq_search in Triton."""

import triton
import triton.language as tl

from ..common.dtype_triton import accumulate, round_to
from ..rvq_lookup.rvq_lookup_triton import project

_FEW_DIMS = 8  # up to here a frame's coordinates stay in registers of their own while the entries pass by


def constants(stages: int, entries: int, dim: int, channels: int) -> dict[str, int]:
    """Return the launch's constexprs, which follow from the quantiser alone."""
    few = dim <= _FEW_DIMS
    return {
        "STAGES": stages,
        "ENTRIES": entries,
        "DIM": dim,
        "CHANNELS": channels,
        "UNROLL": few,
        "BLOCK_F": 16,
        "BLOCK_N": 128,
        "BLOCK_C": 32 if few else 16,  # a deeper step of a wide projection spills
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "BLOCK_Q": triton.next_power_of_2(stages),
        "num_warps": 4,
        "enable_fp_fusion": True,
        "maxnreg": 255,  # ptxas would rather spill a word than give up another block on an SM
    }


@triton.jit
def _pick(table, column, BLOCK: tl.constexpr):
    """Return column `column` of table [F, BLOCK]."""
    return tl.sum(tl.where((tl.arange(0, BLOCK) == column)[None, :], table, 0), axis=1)


@triton.jit
def _scores(query, book, squares, n, ENTRIES: tl.constexpr, DIM: tl.constexpr, UNROLL: tl.constexpr,
            BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Return |c|^2 + query.c of entries n [N] for every frame, infinity past the last; query is -2 e."""
    inside = n < ENTRIES
    square = tl.load(squares + n, mask=inside, other=float("inf"))
    score = tl.broadcast_to(square[None, :], (BLOCK_F, BLOCK_N))
    if UNROLL:
        for i in tl.static_range(DIM):
            coordinate = tl.load(book + i * ENTRIES + n, mask=inside, other=0.0)
            score += _pick(query, i, BLOCK_D)[:, None] * coordinate[None, :]
    else:
        for i in range(DIM):
            coordinate = tl.load(book + i * ENTRIES + n, mask=inside, other=0.0)
            score += _pick(query, i, BLOCK_D)[:, None] * coordinate[None, :]
    return score


# e_i = W_i z + a_i - sum_{j<i} X_ij c_j; code_i = argmin_n |c^_in|^2 - 2 e^_i.c^_in; quantized = sum_i V_i c_i + b_i.
# A program owns BLOCK_F frames of a clip, through all stages; the winners stay in registers. z is read again per stage.
# Scores live in [BLOCK_F, BLOCK_N] registers; every place keeps its smallest score and that entry's index. Entries
# are met in rising order and replaced by smaller scores alone, the last reduction takes the lowest index of equals.
# float32 throughout, never tf32. The book lies [D, N], so neighbouring threads read neighbouring entries.
@triton.jit
def rvq_search_kernel(
    z,  # [B, C, F] f32|f16|bf16
    in_weight,  # [Q, C, D] f32
    in_bias,  # [Q, D] f32: in_bias_i - W_i sum_{j<i} out_bias_j
    cross,  # [Q, Q, D, D] f32: W_i V_j, [.., k, d]
    book,  # [Q, D, N] f32: normalised rows
    squares,  # [Q, N] f32: of the normalised rows
    rows,  # [Q, N, D] f32
    out_weight,  # [Q, D, C] f32
    out_bias,  # [Q, C] f32, summed over the stages up to and with each
    codes,  # [B, q, F] i64
    quantized,  # [B, C, F] as z
    margin,  # [B, q, F] f32
    lengths,  # [B] i64
    used,
    frames,
    tiles,
    z_stride_b,
    z_stride_c,
    z_stride_f,
    quantized_stride_b,
    quantized_stride_c,
    quantized_stride_f,
    HAS_QUANTIZED: tl.constexpr,
    HAS_MARGIN: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    STAGES: tl.constexpr,
    ENTRIES: tl.constexpr,
    DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    b = (tl.program_id(0) // tiles).to(tl.int64)
    f = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    d = tl.arange(0, BLOCK_D)
    valid = tl.cast(frames, tl.int64)
    if HAS_LENGTHS:
        valid = tl.minimum(tl.maximum(tl.load(lengths + b), 0), valid)
    z += b * z_stride_b
    winners = tl.zeros([BLOCK_F, BLOCK_Q], tl.int32)
    broken = tl.zeros([BLOCK_F], tl.int32)  # e was not finite: code 0 from there on, and a NaN sum

    for i in range(used):
        stage = tl.cast(i, tl.int64)
        e = tl.zeros([BLOCK_F, BLOCK_D], tl.float32)
        for c0 in range(0, CHANNELS, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C).to(tl.int64)
            mask = (f < valid)[:, None] & (c < CHANNELS)[None, :]
            value = tl.load(z + f[:, None] * z_stride_f + c[None, :] * z_stride_c, mask=mask, other=0.0)
            at = in_weight + (stage * CHANNELS + c)[:, None] * DIM + d[None, :]
            w = tl.load(at, mask=(c < CHANNELS)[:, None] & (d < DIM)[None, :], other=0.0)
            e = accumulate(value.to(tl.float32), w, e, "ieee")
        e += tl.load(in_bias + stage * DIM + d, mask=d < DIM, other=0.0)[None, :]
        for j in range(i):
            row = rows + (tl.cast(j, tl.int64) * ENTRIES + _pick(winners, j, BLOCK_Q)) * DIM
            column = cross + (stage * STAGES + j) * (DIM * DIM) + d
            off = tl.zeros_like(e)
            for k in range(DIM):
                off += tl.load(row + k)[:, None] * tl.load(column + k * DIM, mask=d < DIM, other=0.0)[None, :]
            e -= off

        norm = tl.sqrt_rn(tl.sum(e * e, axis=1))
        largest = tl.max(tl.where(e == e, tl.abs(e), float("inf")), axis=1)
        broken = tl.where(largest < float("inf"), broken, 1)
        # A square may overflow where the vector itself is finite: then the largest coordinate is divided out first.
        unit = tl.div_rn(e, tl.maximum(largest, 1e-30)[:, None])
        unit_norm = tl.sqrt_rn(tl.sum(unit * unit, axis=1))
        query = e * tl.div_rn(-2.0, tl.maximum(norm, 1e-12))[:, None]
        query = tl.where((norm < float("inf"))[:, None], query, tl.div_rn(-2.0 * unit, unit_norm[:, None]))
        query = tl.where((broken > 0)[:, None], 0.0, query)

        best = tl.full([BLOCK_F, BLOCK_N], float("inf"), tl.float32)
        second = tl.full([BLOCK_F, BLOCK_N], float("inf"), tl.float32)
        index = tl.zeros([BLOCK_F, BLOCK_N], tl.int32)
        for n0 in range(0, ENTRIES, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            score = _scores(query, book + stage * (DIM * ENTRIES), squares + stage * ENTRIES, n,
                            ENTRIES, DIM, UNROLL, BLOCK_F, BLOCK_N, BLOCK_D)  # fmt: skip
            less = score < best
            if HAS_MARGIN:
                second = tl.minimum(second, tl.where(less, best, score))
            index = tl.where(less, n[None, :], index)
            best = tl.where(less, score, best)
        smallest = tl.min(best, axis=1)
        winner = tl.min(tl.where(best == smallest[:, None], index, ENTRIES), axis=1)
        code = tl.where(broken > 0, 0, winner)
        winners = tl.where((tl.arange(0, BLOCK_Q) == i)[None, :], code[:, None], winners)

        at = (b * used + i) * frames + f
        tl.store(codes + at, tl.where(f < valid, code, 0).to(tl.int64), mask=f < frames)
        if HAS_MARGIN:
            others = tl.where((best == smallest[:, None]) & (index == winner[:, None]), second, best)
            gap = tl.min(others, axis=1) - smallest
            gap = tl.where(broken > 0, float("nan"), gap)
            tl.store(margin + at, tl.where(f < valid, gap, 0.0), mask=f < frames)

    if HAS_QUANTIZED:
        quantized += b * quantized_stride_b
        for c0 in range(0, CHANNELS, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C).to(tl.int64)
            total = tl.zeros([BLOCK_F, BLOCK_C], tl.float32)
            for i in range(used):
                total = project(total, _pick(winners, i, BLOCK_Q), i, rows, out_weight, c, ENTRIES, DIM, CHANNELS)
            inside = c < CHANNELS
            at = out_bias + (tl.cast(used, tl.int64) - 1) * CHANNELS + c
            total += tl.load(at, mask=inside, other=0.0)[None, :]
            total = tl.where((broken > 0)[:, None], float("nan"), total)
            total = tl.where((f < valid)[:, None], total, 0.0)
            at = quantized + f[:, None] * quantized_stride_f + c[None, :] * quantized_stride_c
            tl.store(at, round_to(total, quantized.dtype.element_ty), mask=(f < frames)[:, None] & inside[None, :])
