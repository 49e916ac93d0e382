"""Packs weights once into the order in which kernels read them; the results are opaque 1-D tensors.

They need the compiled module. float64 weights pack as float64, all others as float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_conv1d(weight: Tensor) -> Tensor:
    """Pack a convolution's weight [Cout, Cin, K] for `snake_conv1d`, or, two of them joined, for `residual_unit`."""
    return torch.ops.dualcodec_ext.pack_conv1d(weight)


def pack_upsample1d(weight: Tensor, stride: int, mode: str, padding: tuple[int, int]) -> Tensor:
    """Pack an upsampling's weight, phase by phase, for `snake_upsample1d` with the same stride, mode and padding."""
    return torch.ops.dualcodec_ext.pack_upsample1d(weight, stride, mode, list(padding))


def pack_rvq(in_weight: Tensor, in_bias: Tensor, codebooks: Tensor, out_weight: Tensor, out_bias: Tensor) -> Tensor:
    """Pack a quantiser, shapes as in `rvq_search`, for `rvq_search` and `rvq_lookup`."""
    return torch.ops.dualcodec_ext.pack_rvq(in_weight, in_bias, codebooks, out_weight, out_bias)
