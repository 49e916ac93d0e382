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


# op                       float32  float64  bfloat16  float16
_row("causal_dwconv1d", 8e-6, 2e-14, 6e-2, 8e-3)
_row("residual_unit", 2e-5, 4e-14, 8e-2, 1e-2)
_row("rvq_lookup", 4e-6, 1e-14, 4e-2, 5e-3)
_row("snake_conv1d", 1e-5, 3e-14, 8e-2, 1e-2)
_row("snake_upsample1d", 1e-5, 3e-14, 8e-2, 1e-2)
