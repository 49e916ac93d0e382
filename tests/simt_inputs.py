"""Inputs of tests/simt's programs with what the float64 reference makes of them, rounded to the outputs' dtype."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import simt_cases
import torch
import torch.nn.functional as F
from simt_cases import same_bits
from torch import Tensor

from dualcodec_ext import reference

ACTIVATIONS = ("none", "tanh", "gelu")
# What a block may have on the GPUs with the least (8.6, 8.9, 12.0): every tile of the convolutions must fit there.
SMALL_SHARED_BYTES = 99 * 1024


class SimtCase(NamedTuple):
    tensors: dict[str, Tensor | int | None]
    expected: Tensor  # [B, T', C]

    def with_(self, **changes: Tensor | int | None) -> SimtCase:
        """The same inputs on another device, or laid out in another way."""
        return SimtCase({**self.tensors, **changes}, self.expected)


def run_one(op: str, folder: Path, case: SimtCase, seed: int = 1) -> tuple[Tensor, set[str]]:
    """Returns y as [B, T', C], and the kernels that ran."""
    outputs, names = simt_cases.run(simt_cases.program(op), folder, [case.tensors], seed)
    return steps_first(outputs[0]["y"], case), names


def steps_first(y: Tensor, case: SimtCase) -> Tensor:
    """An output as [B, T', C], however it lies."""
    if case.tensors.get("channels_first"):
        batch, steps, channels = y.shape
        return y.reshape(batch, channels, steps).transpose(1, 2)
    return y


def channels_first(t: Tensor | None) -> Tensor | None:
    """[B, T, C] whose memory is [B, C, T], in the shape that a case wants it."""
    return None if t is None else t.transpose(1, 2).contiguous().reshape(t.shape)


def worst(y: Tensor, expected: Tensor) -> float:
    """The largest difference; NaN anywhere counts as infinity."""
    if y.numel() == 0:
        return 0.0
    assert y.shape == expected.shape and y.dtype == expected.dtype
    return (y.double() - expected.double()).abs().nan_to_num(nan=torch.inf).max().item()


def _wide(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double()


def _rows(y: Tensor, dtype: torch.dtype) -> Tensor:
    return y.transpose(1, 2).to(dtype).contiguous()


def conv_fold(channels: int, taps: int, stride: int, dilation: int) -> tuple[int, int]:
    """(steps side by side in a GEMM row, taps of the GEMM), as kernels/common/conv_geometry.h has them."""
    if taps == 1:
        return 1, 1
    if dilation == 1 and channels * taps <= 64:
        return taps, 1
    if dilation == 1 and taps % stride == 0:
        return stride, taps // stride
    return 1, taps


def pack_conv(weight: Tensor, stride: int, dilation: int, dtype: torch.dtype) -> Tensor:
    """[Cout, Cin, K] as csrc/snake_conv1d.cpp packs it for CUDA."""
    columns, channels, taps = weight.shape
    fold, rows = conv_fold(channels, taps, stride, dilation)
    split = weight.reshape(columns, channels, rows, fold)
    packed = split.permute(2, 3, 1, 0).reshape(rows, fold * channels, columns)
    return F.pad(packed, (0, -columns % 16, 0, -(fold * channels) % 32)).to(dtype).contiguous()


def conv_case(
    channels: int,
    columns: int,
    taps: int = 7,
    steps: int = 40,
    batch: int = 1,
    *,
    stride: int = 1,
    dilation: int = 1,
    padding: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    alpha: bool = True,
    bias: bool = True,
    residual: bool = False,
    activation: str = "none",
    lengths: list[int] | None = None,
    first: bool = False,
    **device: int,
) -> SimtCase:
    """One of snake_conv1d; padding None: centred. `first`: the signals lie as [B, C, T]."""
    gen = torch.Generator().manual_seed(channels + columns + taps)
    reach = (taps - 1) * dilation
    left, right = (reach - reach // 2, reach // 2) if padding is None else padding
    x = torch.randn(batch, steps, channels, generator=gen).to(dtype)
    weight = (torch.randn(columns, channels, taps, generator=gen) / (channels * taps) ** 0.5).to(dtype)
    shift = torch.randn(columns, generator=gen) if bias else None
    slope = torch.rand(channels, generator=gen) + 0.5 if alpha else None
    out_steps = max(0, (steps + left + right - reach - 1) // stride + 1)
    extra = torch.randn(batch, out_steps, columns, generator=gen).to(dtype) if residual else None
    valid = None if lengths is None else torch.tensor(lengths)
    expected = reference.snake_conv1d_ref(
        x.double().transpose(1, 2),
        weight.double(),
        _wide(shift),
        _wide(slope),
        stride,
        dilation,
        (left, right),
        activation,
        None if extra is None else extra.double().transpose(1, 2),
        valid,
    )
    tensors: dict[str, Tensor | int | None] = {
        "x": channels_first(x) if first else x,
        "residual": channels_first(extra) if first else extra,
        "weight": pack_conv(weight, stride, dilation, dtype),
        "bias": shift,
        "alpha": slope,
        "lengths": valid,
        "columns": columns,
        "taps": taps,
        "stride": stride,
        "dilation": dilation,
        "left": left,
        "right": right,
        "activation": ACTIVATIONS.index(activation),
        "channels_first": int(first),
        "shared_bytes": SMALL_SHARED_BYTES,
        **device,
    }
    return SimtCase(tensors, _rows(expected, dtype))


def fold_phases(weight: Tensor, stride: int, mode: str, left: int) -> Tensor:
    """[every phase's taps, Cin, Cout], as kernels/snake_upsample1d/phases.h cuts the kernel of 2 * stride taps."""
    taps = []
    for phase in range(stride):
        if mode == "transposed":
            later = (phase + left) % stride
            taps += [weight[:, :, later + stride], weight[:, :, later]]
        else:
            first, last = (phase - left) // stride, (phase - left + 2 * stride - 1) // stride
            sums = [torch.zeros_like(weight[:, :, 0].T) for _ in range(first, last + 1)]
            for k in range(2 * stride):
                sums[(phase - left + k) // stride - first] += weight[:, :, k].T
            taps += sums
    return torch.stack(taps)


def upsample_case(
    channels: int,
    columns: int,
    stride: int,
    mode: str,
    padding: tuple[int, int],
    steps: int = 20,
    batch: int = 1,
    *,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = True,
    lengths: list[int] | None = None,
    first: bool = False,
    **device: int,
) -> SimtCase:
    """One of snake_upsample1d. `first`: the signals lie as [B, C, T]."""
    gen = torch.Generator().manual_seed(channels + columns + stride)
    x = torch.randn(batch, steps, channels, generator=gen).to(dtype)
    shape = (channels, columns) if mode == "transposed" else (columns, channels)
    weight = torch.randn(*shape, 2 * stride, generator=gen, dtype=torch.float64) / (2 * channels) ** 0.5
    if mode == "repeat":
        weight = weight / stride**0.5  # so many taps fall on one frame
    folded = fold_phases(weight, stride, mode, padding[0]).to(dtype)
    shift = torch.randn(columns, generator=gen) if bias else None
    slope = torch.rand(channels, generator=gen) + 0.5
    valid = None if lengths is None else torch.tensor(lengths)
    expected = reference.snake_upsample1d_ref(
        x.double().transpose(1, 2), slope.double(), weight, _wide(shift), stride, mode, padding, valid
    )
    tensors: dict[str, Tensor | int | None] = {
        "x": channels_first(x) if first else x,
        "weight": F.pad(folded, (0, -columns % 16, 0, -channels % 32)).contiguous(),
        "bias": shift,
        "alpha": slope,
        "lengths": valid,
        "columns": columns,
        "stride": stride,
        "mode": int(mode == "repeat"),
        "left": padding[0],
        "right": padding[1],
        "channels_first": int(first),
        "shared_bytes": SMALL_SHARED_BYTES,
        **device,
    }
    return SimtCase(tensors, _rows(expected, dtype))


def dwconv_case(
    channels: int,
    taps: int = 7,
    steps: int = 12,
    batch: int = 1,
    *,
    padding: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = True,
    norm: bool = True,
    norm_bias: bool = True,
    eps: float = 1e-6,
    lengths: list[int] | None = None,
    first: bool = False,
    **device: int,
) -> SimtCase:
    """One of causal_dwconv1d; padding None: causal. `first`: the signals lie as [B, C, T]."""
    gen = torch.Generator().manual_seed(channels + taps)
    left, right = (taps - 1, 0) if padding is None else padding
    x = torch.randn(batch, steps, channels, generator=gen).to(dtype)
    weight = torch.randn(channels, taps, generator=gen) / taps**0.5
    shift = torch.randn(channels, generator=gen) if bias else None
    ln_weight = 1 + 0.1 * torch.randn(channels, generator=gen) if norm else None
    ln_bias = 0.1 * torch.randn(channels, generator=gen) if norm and norm_bias else None
    valid = None if lengths is None else torch.tensor(lengths)
    expected = reference.causal_dwconv1d_ref(
        x.double().transpose(1, 2),
        weight.double(),
        _wide(shift),
        (left, right),
        _wide(ln_weight),
        _wide(ln_bias),
        eps,
        valid,
    )
    tensors: dict[str, Tensor | int | None] = {
        "x": channels_first(x) if first else x,
        "weight": weight,
        "bias": shift,
        "ln_weight": ln_weight,
        "ln_bias": ln_bias,
        "eps": torch.tensor([eps]),
        "lengths": valid,
        "left": left,
        "right": right,
        "channels_first": int(first),
        **device,
    }
    return SimtCase(tensors, _rows(expected, dtype))


__all__ = [
    "SimtCase",
    "channels_first",
    "conv_case",
    "dwconv_case",
    "run_one",
    "same_bits",
    "steps_first",
    "upsample_case",
    "worst",
]


NO_ERROR = torch.iinfo(torch.int64).max


def stream_rows_case(
    runs: list[tuple[int, int, int]],
    kept: list[int] | None = None,
    error: int = 5,
    *,
    batch: int = 3,
    width: int = 6000,
    dtype: torch.dtype = torch.bfloat16,
    **more: int,
) -> SimtCase:
    """One of stream_rows: runs of (to, source, count); error: what its cell holds before."""
    gen = torch.Generator().manual_seed(len(runs))
    to, source = (torch.randn(batch, n, generator=gen).to(dtype) for n in (width, width - 800))
    expected = to.clone()
    told = kept is not None and error != NO_ERROR and more.get("tells", 1)
    rows = [] if told else [b for b in range(batch) if kept is None or kept[b]]
    for at, begin, count in runs:
        expected[rows, at : at + count] = source[rows, begin : begin + count]
    tensors: dict[str, Tensor | int | None] = {"to": to, "source": source, "runs": torch.tensor(runs)}
    tensors |= {"kept": None if kept is None else torch.tensor(kept), "error_before": error, **more}
    return SimtCase(tensors, expected)


def take_codes_case(
    batch: int = 3,
    stages: tuple[int, ...] = (1, 7),
    frames: int = 21,
    width: int = 24,
    *,
    frames_first: bool = False,
    wrong: tuple[int, int, int, int] | None = None,
    value: int = -1,
) -> SimtCase:
    """One of take_codes: of one part or two; wrong: part, item, stage and frame of a code that becomes `value`."""
    gen = torch.Generator().manual_seed(frames)
    tensors: dict[str, Tensor | int | None] = {"frames": frames}
    made = []
    for i, (q, entries) in enumerate(zip(stages, (16384, 4096), strict=False)):
        more = "more_" if i else ""
        shape = (frames, batch, q) if frames_first else (batch, q, frames)
        memory = torch.randint(entries, (5 + batch * q * frames,), generator=gen)
        codes = memory[5:].view(shape)
        codes = codes.permute(1, 2, 0) if frames_first else codes
        if wrong is not None and wrong[0] == i:
            codes[wrong[1:]] = value
        to = torch.randint(entries, (batch, q, width), generator=gen)
        expected = to.clone()
        expected[..., :frames] = codes
        made.append(expected)
        tensors |= {f"{more}codes": memory, f"{more}places": torch.tensor([5, *codes.stride()]), f"{more}to": to}
        tensors |= {f"{more}entries": entries}
    return SimtCase(tensors, torch.cat([x.flatten() for x in made]))
