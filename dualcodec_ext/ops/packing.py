"""Packs weights once into the order in which kernels read them; the results are opaque.

A packed weight belongs to the family of kernels that is to run. `backend("triton")`, or `auto` where it takes Triton,
packs for Triton, as two-dimensional tensors; otherwise the compiled module packs, as one-dimensional ones. float64
weights pack as float64, bfloat16 ones of convolutions as bfloat16 in pairs of channels, all others as float32; CUDA and
Triton's upsampling also keep half precision. The wrong kind is refused in one line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._common import asked_backend, choose_backend, register


def _packers(op: str, weight: Tensor) -> Any:
    """Return the namespace of torch.ops that packs for the family which is to run an op."""
    asked = asked_backend()
    if (asked == "triton" or (asked == "auto" and weight.is_cuda)) and (
        choose_backend(weight.device, weight.dtype, op) == "triton"
    ):
        return torch.ops.dualcodec_ext_triton
    return torch.ops.dualcodec_ext


def pack_conv1d(weight: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
    """Pack a convolution's weight [Cout, Cin, K] for `snake_conv1d` with the same stride and dilation."""
    return _packers("snake_conv1d", weight).pack_conv1d(weight.detach(), stride, dilation)


def pack_residual_unit(weight1: Tensor, weight2: Tensor, winograd: int = 0) -> Tensor:
    """Pack the weights [C, C, 7] and [C, C, 1] of a `residual_unit` with the same `winograd`.

    Winograd's are transformed in float64 and rounded once.
    """
    return _packers("residual_unit", weight1).pack_residual_unit(weight1.detach(), weight2.detach(), winograd)


def pack_upsample1d(weight: Tensor, stride: int, mode: str, padding: tuple[int, int], winograd: int = 0) -> Tensor:
    """Pack an upsampling's weight, phase by phase, for `snake_upsample1d` with the same arguments."""
    packers = _packers("snake_upsample1d", weight)
    return packers.pack_upsample1d(weight.detach(), stride, mode, list(padding), winograd)


def pack_rvq(in_weight: Tensor, in_bias: Tensor, codebooks: Tensor, out_weight: Tensor, out_bias: Tensor) -> Tensor:
    """Pack a quantiser, shapes as in `rvq_search`, for `rvq_search` and `rvq_lookup`."""
    tensors = (t.detach() for t in (in_weight, in_bias, codebooks, out_weight, out_bias))
    return _packers("rvq_search", codebooks).pack_rvq(*tensors)


def _columns(count: int) -> int:
    """Count columns as kernels pad them: kernels/common/dtype.h's kColumnUnit."""
    return -(-count // 16) * 16


def _channels(count: int) -> int:
    """Count channels as CUDA kernels pad them: kernels/common/conv_geometry.h's kChannelUnit."""
    return -(-count // 32) * 32


def _gemm_numel(channels: int, taps: int, stride: int, dilation: int, columns: int) -> int:
    """Count taps * channels * columns of a convolution as CUDA's GEMM: kernels/common/conv_geometry.h."""
    fold = 1
    if taps > 1 and dilation == 1:
        fold = taps if channels * taps <= 64 else stride if taps % stride == 0 else 1
    return taps // fold * _channels(fold * channels) * _columns(columns)


def _packed(like: Tensor, numel: int) -> Tensor:
    return like.new_empty(numel, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


def _panels(weight: Tensor, taps: int, channels: int, columns: int) -> Tensor:
    """Return the CPU's packed weight, as csrc/packing.h counts it: bfloat16 lies in pairs of channels."""
    if weight.dtype != torch.bfloat16:
        return _packed(weight, taps * channels * _columns(columns))
    return weight.new_empty(taps * (channels + channels % 2) * _columns(columns))


def _fake_conv1d(weight: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
    columns, channels, taps = weight.shape
    if weight.is_cuda:
        return weight.new_empty(_gemm_numel(channels, taps, stride, dilation, columns))
    if channels == 1 and weight.dtype == torch.bfloat16:  # its taps lie in pairs
        return _panels(weight, 1, taps, columns)
    return _panels(weight, taps, channels, columns)


def _fake_residual_unit(weight1: Tensor, weight2: Tensor, winograd: int = 0) -> Tensor:
    channels = weight1.shape[0]
    if weight1.is_cuda:
        return weight1.new_empty(8 * _channels(channels) * _columns(channels))
    if winograd:  # a transformed weight is float32 at least
        return _packed(weight1, (winograd + 1) * channels * _columns(channels))
    return _panels(weight1, 8, channels, channels)


def _fake_upsample1d(weight: Tensor, stride: int, mode: str, padding: Sequence[int], winograd: int = 0) -> Tensor:
    if mode == "transposed":
        channels, columns, taps = weight.shape[0], weight.shape[1], 2 * stride
    else:
        columns, channels = weight.shape[0], weight.shape[1]
        firsts = [phase - padding[0] for phase in range(stride)]  # the repeated sample under a phase's first tap
        taps = sum((first + 2 * stride - 1) // stride - first // stride + 1 for first in firsts)
    if weight.is_cuda:
        return weight.new_empty(taps * _channels(channels) * _columns(columns))
    if winograd:  # a transformed weight is float32 at least
        return _packed(weight, winograd * stride * channels * _columns(columns))
    return _panels(weight, taps, channels, columns)


def _fake_rvq(in_weight: Tensor, in_bias: Tensor, codebooks: Tensor, out_weight: Tensor, out_bias: Tensor) -> Tensor:
    # The parts in the order of kernels/rvq_search/layout.h.
    (stages, entries, dim), channels = codebooks.shape, out_weight.shape[1]
    codes, out = _columns(stages * dim), _columns(channels)
    books = stages * _columns(entries) * (dim + 1) + stages * entries * dim
    floats = (
        (channels + 2) * codes
        + stages * stages * dim * dim
        + books
        + stages * dim * out
        + 2 * stages * out
        + stages * (stages + 3)
    )
    passes = -(-entries // 256) if dim <= 8 else 0  # 256 rows of 8 bytes each
    return _packed(codebooks, _columns(floats) + stages * passes * 512)


def _fake_upsample1d_triton(
    weight: Tensor, stride: int, mode: str, padding: Sequence[int], winograd: int = 0
) -> Tensor:
    first, second = weight.shape[:2]
    rows, columns = (2 * first, stride * second) if mode == "transposed" else (3 * second, stride * first)
    half = weight.dtype in (torch.bfloat16, torch.float16)
    return weight.new_empty(rows, columns, dtype=weight.dtype if half else torch.float32)


def _fake_rvq_triton(
    in_weight: Tensor, in_bias: Tensor, codebooks: Tensor, out_weight: Tensor, out_bias: Tensor
) -> Tensor:
    # The parts of ops/triton/rvq.py, which imports no triton.
    from .triton import rvq

    stages, entries, dim = codebooks.shape
    total = rvq.total(rvq.shapes(stages, entries, dim, out_weight.shape[1]))
    return codebooks.new_empty(1, total, dtype=torch.float32)


register("pack_conv1d", _fake_conv1d, None, tensors=())
register("pack_residual_unit", _fake_residual_unit, None, tensors=())
register("pack_upsample1d", _fake_upsample1d, None, tensors=(), triton_fake=_fake_upsample1d_triton)
register("pack_rvq", _fake_rvq, None, tensors=(), triton_fake=_fake_rvq_triton)
