"""rvq_lookup in Triton."""

import triton
import triton.language as tl

from ..common.dtype_triton import round_to


def constants(stages: int, entries: int, dim: int, channels: int) -> dict[str, int]:
    """Return the launch's constexprs, which follow from the quantiser alone; stages is left to the launch."""
    return {
        "ENTRIES": entries,
        "DIM": dim,
        "CHANNELS": channels,
        "BLOCK_F": 16,
        "BLOCK_C": min(64, max(16, triton.next_power_of_2(channels))),
        "num_warps": 4,
        "enable_fp_fusion": True,
        "maxnreg": 255,  # ptxas would rather spill a word than give up another block on an SM
    }


@triton.jit
def project(acc, code, stage, rows, out_weight, c, ENTRIES: tl.constexpr, DIM: tl.constexpr, CHANNELS: tl.constexpr):
    """Return acc [F, C] + the stage's projection of the rows that code [F] names, which is summed on its own first."""
    part = tl.zeros_like(acc)
    stage = tl.cast(stage, tl.int64)
    row = rows + (stage * ENTRIES + code) * DIM
    column = out_weight + stage * (DIM * CHANNELS) + c
    for d in range(DIM):
        r = tl.load(row + d)
        v = tl.load(column + d * CHANNELS, mask=c < CHANNELS, other=0.0)
        part += r[:, None] * v[None, :]
    return acc + part


# y[b, :, f] = sum over stages i of V_i row_i(codes[b, i, f]) + b_i, plus addend[b, :, f].
# A program owns BLOCK_F frames by BLOCK_C channels of a clip. float32 accumulation, each stage on its own. A code out
# of range is never followed: its flat position goes into `error` by an atomic minimum, row 0 stands in and the frame
# becomes NaN. No alignment is needed.
@triton.jit
def rvq_lookup_kernel(
    codes,  # [B, q, F] integers
    rows,  # [Q, N, D] f32
    out_weight,  # [Q, D, C] f32
    out_bias,  # [Q, C] f32, summed over the stages up to and with each
    addend,  # [B, C, F] f32|f16|bf16
    y,  # [B, C, F] f32|f16|bf16
    lengths,  # [B] i64
    error,  # [1] i64
    stages,
    frames,
    tiles,
    codes_stride_b,
    codes_stride_q,
    codes_stride_f,
    addend_stride_b,
    addend_stride_c,
    addend_stride_f,
    y_stride_b,
    y_stride_c,
    y_stride_f,
    HAS_ADDEND: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    ENTRIES: tl.constexpr,
    DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b = (tl.program_id(0) // tiles).to(tl.int64)
    f = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = tl.cast(frames, tl.int64)
    if HAS_LENGTHS:
        valid = tl.minimum(tl.maximum(tl.load(lengths + b), 0), valid)
    looked = f < valid
    acc = tl.zeros([BLOCK_F, BLOCK_C], tl.float32)
    wrong = tl.zeros([BLOCK_F], tl.int32)
    for i in range(stages):
        at = codes + b * codes_stride_b + tl.cast(i, tl.int64) * codes_stride_q + f * codes_stride_f
        code = tl.load(at, mask=looked, other=0).to(tl.int64)
        bad = (code < 0) | (code >= ENTRIES)
        position = (b * stages + i) * frames + f
        tl.atomic_min(error + tl.zeros([BLOCK_F], tl.int32), position, mask=bad, sem="relaxed")
        wrong = tl.where(bad, 1, wrong)
        acc = project(acc, tl.where(bad, 0, code), i, rows, out_weight, c, ENTRIES, DIM, CHANNELS)
    inside = c < CHANNELS
    acc += tl.load(out_bias + (tl.cast(stages, tl.int64) - 1) * CHANNELS + c, mask=inside, other=0.0)[None, :]
    if HAS_ADDEND:
        at = addend + b * addend_stride_b + f[:, None] * addend_stride_f + c[None, :] * addend_stride_c
        acc += tl.load(at, mask=looked[:, None] & inside[None, :], other=0.0).to(tl.float32)
    acc = tl.where((wrong > 0)[:, None], float("nan"), acc)
    acc = tl.where(looked[:, None], acc, 0.0)
    at = y + b * y_stride_b + f[:, None] * y_stride_f + c[None, :] * y_stride_c
    tl.store(at, round_to(acc, y.dtype.element_ty), mask=(f < frames)[:, None] & inside[None, :])
