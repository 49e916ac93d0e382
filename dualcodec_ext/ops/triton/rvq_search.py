"""Host side of rvq_search; the contract is `ops.rvq_search`'s."""

from __future__ import annotations

import torch
from torch import Tensor

from dualcodec_ext.kernels.rvq_search import rvq_search_triton as kernel

from . import _host as host
from . import rvq


def rvq_search(
    z: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    codebooks: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    num_quantizers: int,
    return_quantized: bool,
    return_margin: bool,
    lengths: Tensor | None,
    packed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Check, allocate, launch."""
    op = "rvq_search"
    host.check_signal(op, "z", z)
    sizes = rvq.check_quantizer(op, codebooks, out_weight, out_bias, z)
    stages, _, _, channels = sizes
    host.check(z.shape[1] == channels, op, f"z must be [B, C, F] with C = {channels}, got {list(z.shape)}")
    rvq.check_input(op, in_weight, in_bias, sizes, z)
    used = num_quantizers
    host.check(1 <= used <= stages, op, f"num_quantizers must be in 1..{stages}, got {used}")
    batch, _, frames = z.shape
    lengths = host.check_lengths(op, lengths, batch, frames, z)
    if packed is not None:
        parts = rvq.open_packed(op, packed, sizes, z)
    else:
        parts = rvq.open_packed(op, rvq.pack_rvq(in_weight, in_bias, codebooks, out_weight, out_bias), sizes, z)

    shape = (batch, used, frames)
    codes = torch.empty(shape, dtype=torch.int64, device=z.device)
    quantized, strides = z.new_empty(0), [0, 0, 0]
    if return_quantized:
        quantized = host.empty_signal(batch, channels, frames, z, host.is_channels_last(z))
        strides = list(quantized.stride())
    margin = torch.empty(shape if return_margin else 0, dtype=torch.float32, device=z.device)
    if codes.numel() == 0:
        return codes, quantized, margin
    constants = kernel.constants(*sizes)
    tiles = host.blocks(frames, constants["BLOCK_F"])
    host.launch(
        kernel.rvq_search_kernel,
        (batch * tiles,),
        z.device,
        z.detach(),
        *parts.values(),
        codes,
        quantized,
        margin,
        lengths,
        used,
        frames,
        tiles,
        *z.stride(),
        *strides,
        HAS_QUANTIZED=return_quantized,
        HAS_MARGIN=return_margin,
        HAS_LENGTHS=lengths is not None,
        **constants,
    )
    return codes, quantized, margin
