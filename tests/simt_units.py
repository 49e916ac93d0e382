"""Cases of residual_unit for tests/simt's programs, and what the reference makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import simt_cases
import torch
import torch.nn.functional as F
from tolerances import BF16, F16, F32, TOLERANCE
from torch import Tensor

from dualcodec_ext.reference import residual_unit_ref
from dualcodec_ext.reference.ops import snake


def case(
    channels: int = 48,
    steps: int = 70,
    batch: int = 1,
    dilation: int = 1,
    causal: bool = False,
    padding: tuple[int, int] | None = None,
    dtype: torch.dtype = BF16,
    lengths: list[int] | None = None,
    bias: bool = True,
    out_alpha: bool = False,
    **settings: int,
) -> tuple[dict[str, Any], Tensor]:
    """Return a case for the program, and the reference's output [B, T', C] in float64."""
    gen = torch.Generator().manual_seed(channels + steps)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen)

    x = noise(batch, steps, channels).to(dtype)
    weight1 = (noise(channels, channels, 7) / (7 * channels) ** 0.5).to(dtype)
    weight2 = (0.5 * noise(channels, channels, 1) / channels**0.5).to(dtype)
    alpha1, alpha2 = (0.3 * noise(channels)).exp(), (0.3 * noise(channels)).exp()
    bias1, bias2 = (0.1 * noise(channels), 0.1 * noise(channels)) if bias else (None, None)
    centre = 6 if causal else 3
    left, right = padding or (centre * dilation, (6 - centre) * dilation)
    counts = None if lengths is None else torch.tensor(lengths)
    wide = [None if t is None else t.double() for t in (alpha1, weight1, bias1, alpha2, weight2, bias2)]
    expected = residual_unit_ref(x.double().transpose(1, 2), *wide, dilation, (left, right), causal, counts)
    out = (0.3 * noise(channels)).exp() if out_alpha else None
    if out is not None:
        expected = snake(expected.to(dtype).double(), out.double())
    taps = torch.cat([weight1, weight2], 2).permute(2, 1, 0)
    tensors = {
        "x": x,
        "weight": F.pad(taps, (0, -channels % 16, 0, -channels % 32)),
        "alpha1": alpha1,
        "alpha2": alpha2,
        "out_alpha": out,
        "bias1": bias1,
        "bias2": bias2,
        "lengths": counts,
        "dilation": dilation,
        "left": left,
        "right": right,
        "centre": centre,
        **settings,
    }
    if settings.get("channels_first"):
        tensors["x"] = x.transpose(1, 2).contiguous().view(x.shape)
    return tensors, expected.transpose(1, 2)


def output(tensors: dict[str, Any], outputs: dict[str, Tensor]) -> Tensor:
    y = outputs["y"]
    if tensors.get("channels_first"):
        return y.view(y.shape[0], y.shape[2], y.shape[1]).transpose(1, 2)
    return y


def bits(y: Tensor) -> Tensor:
    return y.contiguous().view(torch.int16 if y.itemsize == 2 else torch.int32)


def check(program: Path, folder: Path, tensors: dict[str, Any], expected: Tensor, seed: int = 1) -> set[str]:
    """Compare a case with the reference; returns the names of the kernels that ran."""
    outputs, names = simt_cases.run(program, folder, [tensors], seed)
    y = output(tensors, outputs[0])
    assert y.shape == expected.shape
    tf32 = tensors.get("allow_tf32", 0) and y.dtype == F32
    bound = TOLERANCE["residual_unit", F16 if tf32 else y.dtype]  # tf32 rounds operands to float16's 10 bits
    slope = 1 if tensors["out_alpha"] is None else 2  # Snake's
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=slope * bound)
    return names
