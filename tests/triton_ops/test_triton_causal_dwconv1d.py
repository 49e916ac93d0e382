"""causal_dwconv1d in Triton: the compiled op's tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import opsuite as suite
import pytest
import test_causal_dwconv1d as compiled
import torch
from opsuite import Case

from dualcodec_ext import ops


@pytest.fixture
def case(device: str) -> Any:
    def make(*args: Any, **options: Any) -> Case:
        made = compiled.case(*args, **options)
        weights = {k: None if v is None else v.to(device) for k, v in made.weights.items()}
        return replace(made, x=made.x.to(device), weights=weights)

    return make


@pytest.mark.parametrize("shape", compiled.SHAPES.values(), ids=compiled.SHAPES.keys())
def test_forward(case: Any, shape: dict[str, Any]) -> None:
    suite.check(case(**shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(case: Any, dtype: torch.dtype) -> None:
    suite.check(case(48), dtype)
    suite.check(case(48, norm=False), dtype)


@pytest.mark.parametrize("taps", [7, 31])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codec_shape(case: Any, taps: int, dtype: torch.dtype) -> None:
    """768 channels in tiles of four steps, the last one short."""
    suite.check_2x(case(768, taps, 135, batch=1), dtype)


def test_more_channels_than_a_block_holds(case: Any) -> None:
    suite.check(case(1100, steps=7))
    suite.check(case(300, steps=40, norm=False))


def test_gradients(case: Any) -> None:
    suite.check_frozen_weights(case(4, 3, 9))
    suite.check_mixed_gradients(case(4, 3, 9))


def test_strides_and_slices(case: Any) -> None:
    suite.check_layouts(case(19))


def test_weights_of_any_stride(case: Any) -> None:
    made = case(19)
    wide = made.weights["weight"].new_full((38, 15), torch.nan)
    wide[::2, 1::2] = made.weights["weight"]
    expected = made.actual()
    made.weights["weight"] = wide[::2, 1::2]
    assert torch.equal(made.call(ops.causal_dwconv1d), expected)


@pytest.mark.parametrize("steps", [0, 1, 2, 6, 7, 63])
def test_edge_sizes(case: Any, steps: int) -> None:
    suite.check(case(steps=steps))
    suite.check(case(steps=steps, padding=(0, 0)))
    suite.check(case(steps=steps, batch=0))


def test_lengths(case: Any) -> None:
    suite.check_lengths(case(20, batch=4), [40, 0, 1, 17])
    suite.check_lengths(case(20, batch=3, padding=(3, 3), norm=False), [40, 8, 3], torch.bfloat16)


def test_bits_do_not_depend_on_the_batch_or_the_tile(case: Any) -> None:
    whole = case(768, steps=23)
    suite.check_alone(whole)
    parts, context = [], whole.x.new_zeros(2, 768, 6)
    for piece in whole.x.split([1, 2, 13, 0, 7], dim=-1):
        x = torch.cat([context, piece], dim=-1)
        parts.append(ops.causal_dwconv1d(x, **whole.weights, padding=(0, 0)))
        context = x[..., -6:]
    assert torch.equal(torch.cat(parts, -1), whole.actual())


def test_nan_reaches_its_samples_alone(case: Any) -> None:
    made = case(norm=False)
    made.x[1, 2, 10] = torch.nan
    y = made.actual()
    assert y[1, 2, 10:17].isnan().all() and int(y.isnan().sum()) == 7


@pytest.mark.parametrize(
    "change, text",
    [
        ({"x": torch.zeros(9, 40)}, r"x must be \[B, C, T\], got \[9, 40\]"),
        ({"weight": torch.zeros(8, 7)}, r"weight must be \[C, K\] with C = 9 and K in 1..64, got \[8, 7\]"),
        ({"weight": torch.zeros(9, 65)}, r"K in 1..64, got \[9, 65\]"),
        ({"bias": torch.zeros(8)}, r"bias must be \[C\] = \[9\], got \[8\]"),
        ({"ln_weight": torch.zeros(8)}, r"ln_weight must be \[C\] = \[9\], got \[8\]"),
        ({"ln_weight": None}, "ln_bias must come with ln_weight, got ln_bias alone"),
        ({"padding": (0, -1)}, r"padding must be two non-negative integers \(left, right\), got \[0, -1\]"),
        ({"lengths": torch.zeros(2, dtype=torch.int32)}, "lengths must be int64, got Int"),
        ({"lengths": torch.tensor([0, 41])}, r"lengths\[1\] must be in 0..40, got 41"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_errors(case: Any, device: str, change: dict[str, Any], text: str) -> None:
    made = case()
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(ValueError, match="causal_dwconv1d: .*" + text) as raised:
        ops.causal_dwconv1d(**{"x": made.x, **made.weights, **moved})
    assert "\n" not in str(raised.value)


def test_opcheck(case: Any) -> None:
    made = case(steps=20)
    w = [t.requires_grad_() for t in made.weights.values()]
    x, namespace = made.x.requires_grad_(), "dualcodec_ext_triton"
    lengths = torch.tensor([20, 9])
    suite.check_opcheck("causal_dwconv1d", x, w[0], w[1], [6, 0], w[2], w[3], 1e-6, lengths, namespace=namespace)
    last = made.x.detach().transpose(1, 2).contiguous().transpose(1, 2)
    args = (last, w[0].detach(), None, [3, 3], None, None, 1e-6, None)
    suite.check_opcheck("causal_dwconv1d", *args, namespace=namespace)


def test_compiles(case: Any) -> None:
    suite.check_compiles(case())
    suite.check_compiles_dynamic(case(padding=(0, 1)))


def test_determinism(case: Any) -> None:
    made = case(768, steps=9)
    assert torch.equal(made.actual(), made.actual())
