"""What Triton kernels share about element types."""

import triton
import triton.language as tl

# Triton's interpreter, which the tests run, multiplies bfloat16 as integers and drops the bits it should round.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Round float32 to a dtype, half to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x == x, rounded, 0x7FC0)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a b: operands of one dtype, float32 accumulation."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def accumulate(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a b: of float32 a sum of its own, begun at zero, where one chain of thousands of products would lose
    twice what plain PyTorch does.

    It is added by an fma with one, whose bits are an addition's: Triton makes acc + dot(a, b, 0) a dot(a, b, acc).
    """
    if a.dtype == tl.float32:
        product = dot(a, b, tl.zeros(acc.shape, tl.float32), PRECISION)
        return tl.fma(product, tl.full(acc.shape, 1.0, tl.float32), acc)
    else:
        return dot(a, b, acc, PRECISION)
