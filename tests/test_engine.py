"""The engine's steps as whole tensors run through them on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import dualcodec_ext as dx
from dualcodec_ext.engine import Engine, hand_snakes_on
from dualcodec_ext.reference.ops import snake
from dualcodec_ext.steps import ConvStep, ResidualUnitStep, Step, run


def on_a_gpu(step: Step, x: Tensor) -> Tensor:
    """A step by the kernels of the CPU, which have no Snake behind a unit."""
    if isinstance(step, ResidualUnitStep) and step.out_alpha is not None:
        return snake(replace(step, out_alpha=None)(x, None), step.out_alpha)
    return step(x, None)


@pytest.mark.parametrize("part", ["_decoder", "_acoustic_encoder"])
def test_units_hand_the_next_convolutions_snake_on(part: str) -> None:
    torch.manual_seed(0)
    model = dx.reference.DualCodec(**dx.DualCodecConfig.preset("tiny").to_dict()).eval()
    steps: list[Step] = getattr(Engine(model, torch.float32, form="direct"), part)
    handed = hand_snakes_on(steps)
    given = [i for i, step in enumerate(handed) if isinstance(step, ResidualUnitStep) and step.out_alpha is not None]
    assert len(given) >= 3
    for i in given:
        behind, before = handed[i + 1], steps[i + 1]
        assert not isinstance(behind, ResidualUnitStep) and not isinstance(before, ResidualUnitStep)
        assert getattr(behind, "alpha", 0) is None and handed[i].out_alpha is getattr(before, "alpha", None)
    last = handed[-1]
    assert isinstance(last, ConvStep) and (last.weight.shape[0] > 1 or last.alpha is not None)
    first = steps[0]
    assert isinstance(first, ConvStep)
    x = torch.randn(2, first.weight.shape[1], 960 if part == "_acoustic_encoder" else 4)
    with torch.no_grad():
        y = x
        for step in handed:
            y = on_a_gpu(step, y)
        torch.testing.assert_close(y, run(steps, x, None), rtol=0, atol=2e-5)
