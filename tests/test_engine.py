"""The engine's steps as whole tensors run through them on a GPU."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import dualcodec_ext as dx
from dualcodec_ext import engine as engine_module
from dualcodec_ext import ops
from dualcodec_ext.engine import Engine, hand_snakes_on
from dualcodec_ext.reference.ops import snake
from dualcodec_ext.steps import ConvStep, ResidualUnitStep, Step, UpsampleStep, run
from dualcodec_ext.testing import TINY


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A GPU's forms of the ops by the kernels of the CPU, which have no Snake behind a layer: the channels of the units
    that were given x through their first Snake."""
    unit, upsample, found = ops.residual_unit, ops.snake_upsample1d, []

    def residual_unit(
        x: Tensor, *tensors: Any, out_alpha: Tensor | None = None, snaked: Tensor | None = None, **options: Any
    ) -> Tensor:
        if snaked is not None:
            assert torch.equal(snaked, snake(x, tensors[0]))
            found.append(x.shape[1])
        y = unit(x, *tensors, **options)
        return y if out_alpha is None else snake(y, out_alpha)

    def residual_unit_pair(x: Tensor, *tensors: Any, out_alpha: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        y = residual_unit(x, *tensors, **options)
        return y, snake(y, out_alpha)

    def snake_upsample1d_pair(*args: Any, out_alpha: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        y = upsample(*args, **options)
        return y, snake(y, out_alpha)

    for made in (residual_unit, residual_unit_pair, snake_upsample1d_pair):
        monkeypatch.setattr(ops, made.__name__, made)
    return found


@pytest.mark.parametrize("part", ["_decoder", "_acoustic_encoder"])
@pytest.mark.parametrize("wide", [False, True], ids=["narrow units", "wide units"])
def test_units_hand_the_next_layers_snake_on(
    part: str, wide: bool, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(engine_module, "_has_pass", lambda unit: wide)
    model = dx.reference.DualCodec(**dx.DualCodecConfig.preset("tiny").to_dict()).eval()
    steps: list[Step] = getattr(Engine(model, torch.float32, form="direct"), part)
    handed = hand_snakes_on(steps)
    given = [i for i, step in enumerate(handed) if isinstance(step, ResidualUnitStep) and step.out_alpha is not None]
    alone = [i for i in given if not handed[i].hands_both]
    assert len(alone) >= 3
    for i in alone:
        behind, before = handed[i + 1], steps[i + 1]
        assert not isinstance(behind, ResidualUnitStep) and not isinstance(before, ResidualUnitStep)
        assert getattr(behind, "alpha", 0) is None and handed[i].out_alpha is getattr(before, "alpha", None)
    last = handed[-1]
    assert isinstance(last, ConvStep) and (last.weight.shape[0] > 1 or last.alpha is not None)
    first = steps[0]
    assert isinstance(first, ConvStep)
    x = torch.randn(2, first.weight.shape[1], 960 if part == "_acoustic_encoder" else 4)
    with torch.no_grad():
        y = run(handed, x, None)
        fed = [
            step.tensors[1].shape[0]
            for before, step in pairwise(steps)
            if isinstance(step, ResidualUnitStep) and not isinstance(before, ConvStep)
        ]
        assert reads == (fed if wide else []) and len(fed) >= 8
        torch.testing.assert_close(y, run(steps, x, None), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_units_of_16_bits_are_handed_both(dtype: torch.dtype) -> None:
    model = dx.reference.DualCodec(**{**TINY, "decoder_dim": 800, "decoder_rates": (5, 3, 2)}).eval()
    steps = Engine(model, dtype, form="direct")._decoder
    handed = hand_snakes_on(steps)
    found = []
    for step, behind in pairwise(handed):
        both = step.out_alpha is not None if isinstance(step, UpsampleStep) else getattr(step, "hands_both", False)
        if both:
            assert isinstance(step, UpsampleStep | ResidualUnitStep) and isinstance(behind, ResidualUnitStep)
            assert step.out_alpha is behind.tensors[0]
            found.append((type(step), behind.tensors[1].shape[0]))
    kinds = (UpsampleStep, ResidualUnitStep, ResidualUnitStep)
    assert found == [(kind, channels) for channels in (400, 200) for kind in kinds if dtype == torch.bfloat16]
    # The first one's Snake stays its own; the others are handed theirs, whatever they hand on.
    assert [step.alpha is None for step in handed if isinstance(step, UpsampleStep)] == [False, True, True]
