"""Snake for Triton kernels: kernels/common/snake.h's reduction and polynomial."""

import triton
import triton.language as tl


@triton.jit
def snake(x, alpha, inverse):
    """Return x + sin(alpha x)^2 inverse; inverse is 1 / (alpha + 1e-9), all float32."""
    y = alpha * x
    n = tl.floor(tl.fma(y, 0.318309886183790672, 0.5))
    # Whole multiples of pi, in three parts whose first two products are exact for |y| <= 1e4.
    t = tl.fma(n, -3.140625, y)
    t = tl.fma(n, -9.67502593994140625e-4, t)
    t = tl.fma(n, -1.509957990978376e-7, t)
    # Where float32 no longer tells periods apart the sine may be anything, but not large; of infinity it is NaN.
    t = tl.where(tl.abs(t) < 2.0, t, t * 0.0)
    s = t * t
    p = tl.fma(s, -2.38880801039586421e-8, 2.75252066005060225e-6)
    p = tl.fma(p, s, -0.000198408599651234484)
    p = tl.fma(p, s, 0.00833333096483573796)
    p = tl.fma(p, s, -0.166666666165675098)
    p = tl.fma(p, s, 1.0)
    t = t * p
    return tl.fma(t * t, inverse, x)
