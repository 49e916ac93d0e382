"""Host side of rvq_lookup; the contract is `ops.rvq_lookup`'s."""

from __future__ import annotations

import torch
from torch import Tensor

from dualcodec_ext.kernels.rvq_lookup import rvq_lookup_triton as kernel

from . import _host as host
from . import rvq

_NONE = torch.iinfo(torch.int64).max  # the error cell where every code is in range
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def rvq_lookup(
    codes: Tensor,
    codebooks: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    addend: Tensor | None,
    lengths: Tensor | None,
    channels_last: bool,
    packed: Tensor | None,
) -> Tensor:
    """Check, allocate, launch, and raise for a code out of range.

    While a CUDA graph is captured nothing can be read back: such a frame is NaN, and that is all.
    """
    op = "rvq_lookup"
    host.check(codes.dim() == 3, op, f"codes must be [B, q, F], got {list(codes.shape)}")
    host.check(codes.dtype in _INTEGERS, op, f"codes must be integers, got {host.dtype_name(codes.dtype)}")
    sizes = rvq.check_quantizer(op, codebooks, out_weight, out_bias, codes)
    stages, entries, _, channels = sizes
    batch, used, frames = codes.shape
    host.check(1 <= used <= stages, op, f"codes must have 1..{stages} stages, got {list(codes.shape)}")
    if addend is not None:
        host.check_shape(op, "addend", addend, [batch, channels, frames], "[B, C, F]", codes)
    like = out_weight if addend is None else addend
    host.check_signal(op, "addend" if addend is not None else "out_weight", like)
    lengths = host.check_lengths(op, lengths, batch, frames, codes)
    if packed is not None:
        parts = rvq.open_packed(op, packed, sizes, codes)
        rows, projection, bias = parts["rows"], parts["out_weight"], parts["out_bias"]
    else:
        rows = codebooks.detach().float().contiguous()
        projection = out_weight.detach().float().transpose(1, 2).contiguous()
        bias = torch.cumsum(out_bias.detach().double(), 0).float()

    last = host.is_channels_last(addend) if addend is not None else channels_last
    y = host.empty_signal(batch, channels, frames, like, last)
    if y.numel() == 0:
        return y
    error = torch.full((1,), _NONE, dtype=torch.int64, device=codes.device)
    constants = kernel.constants(*sizes)
    tiles = host.blocks(frames, constants["BLOCK_F"])
    host.launch(
        kernel.rvq_lookup_kernel,
        (batch * tiles, host.blocks(channels, constants["BLOCK_C"])),
        codes.device,
        codes,
        rows,
        projection,
        bias,
        None if addend is None else addend.detach(),
        y,
        lengths,
        error,
        used,
        frames,
        tiles,
        *codes.stride(),
        *(y if addend is None else addend).stride(),
        *y.stride(),
        HAS_ADDEND=addend is not None,
        HAS_LENGTHS=lengths is not None,
        **constants,
    )
    if not host.capturing():
        position = int(error.item())
        if position != _NONE:
            b, stage, frame = position // (used * frames), position // frames % used, position % frames
            got = f"got {int(codes[b, stage, frame])} at batch {b}, stage {stage}, frame {frame}"
            host.check(False, op, f"codes must be in [0, {entries}), {got}")
    return y
