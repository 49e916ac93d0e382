"""Absolute tolerances against float64, one per op and dtype, for outputs of order one at small shapes.

Measured over this suite's cases and three instruction sets (AMD Zen 5, GCC 12.2, torch 2.13), inputs and weights
rounded to the dtype first; the worst error seen stands behind each row. 100,000 outputs and more go by the rule of
twice plain PyTorch's error instead: `testing.assert_close_to_f64`.
"""

import torch

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

TOLERANCE: dict[tuple[str, torch.dtype], float] = {}


def _row(op: str, f32: float, f64: float, bf16: float, f16: float) -> None:
    TOLERANCE.update({(op, F32): f32, (op, F64): f64, (op, BF16): bf16, (op, F16): f16})


# op                       float32  float64  bfloat16  float16    worst seen, in the same order
_row("causal_dwconv1d", 3e-6, 3e-15, 2e-2, 2.5e-3)  # 1.1e-6, 8.9e-16, 0.0078, 0.00097
_row("residual_unit", 6e-6, 1.2e-14, 4e-2, 5e-3)  # 2.5e-6, 4.4e-15, 0.015, 0.0019
_row("rvq_lookup", 2e-6, 3e-15, 4e-2, 5e-3)  # 7.9e-7, 8.9e-16, 0.015, 0.0019
_row("snake_conv1d", 5e-6, 1.2e-14, 4e-2, 5e-3)  # 1.8e-6, 4.4e-15, 0.015, 0.0020
_row("snake_upsample1d", 4e-6, 2e-14, 4e-2, 5e-3)  # 1.6e-6, 7.1e-15, 0.016, 0.0019

# Between a Conformer's linear layers, on AMD Zen 4. Worst seen: 1.1e-6, 0.0056; 2.0e-6, 0.027; 1.5e-6, 0.016.
TOLERANCE["conformer_attention", F32] = 3e-6
TOLERANCE["conformer_attention", BF16] = 1.5e-2
TOLERANCE["conformer_convolution", F32] = 5e-6
TOLERANCE["conformer_convolution", BF16] = 6e-2
TOLERANCE["conformer_linear", F32] = 1e-5
TOLERANCE["conformer_linear", BF16] = 4e-2
TOLERANCE["conformer_norm", F32] = 4e-6
TOLERANCE["conformer_norm", BF16] = 4e-2

# The CUDA kernels on the CPU go by these rows too, with the reference rounded to the dtype. Worst seen: causal_dwconv1d
# 9.5e-7, 0.0039, 0.00098; snake_conv1d 1.9e-6, 0.031, 0.0039, one unit in the last place of an output of 4 to 8.
TOLERANCE["snake_conv1d, tf32", F32] = 4e-3  # 0.0013

# residual_unit's Winograd forms, whose transforms magnify rounding; on AMD Zen 4. Worst seen: 1.5e-5, 2.4e-14; 4.2e-6,
# 5.3e-15.
TOLERANCE["residual_unit, 10 products", F32] = 3.5e-5
TOLERANCE["residual_unit, 10 products", F64] = 6e-14
TOLERANCE["residual_unit, 22 products", F32] = 2e-5
TOLERANCE["residual_unit, 22 products", F64] = 4e-14
TOLERANCE["residual_unit, 13 products", F32] = 1e-5
TOLERANCE["residual_unit, 13 products", F64] = 1.5e-14

# Streams against the whole decode, whose residual units and upsamplings take other forms: 1.02e-5 in float32 (12hz_v1).
# bfloat16: 4.10e-2 with the generic and the AVX2 kernels (tiny), where float64 is 4.3e-2 from the stream and 5.0e-2
# from the whole. The other types' bounds are not yet tightened by a measurement.
_row("stream, decode", 2e-5, 1e-13, 6e-2, 5e-3)
