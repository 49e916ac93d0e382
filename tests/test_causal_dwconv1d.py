"""causal_dwconv1d: depthwise convolution with an optional LayerNorm behind it."""

from __future__ import annotations

from typing import Any

import opsuite as suite
import pytest
import torch
from opsuite import Case
from torch import Tensor

from dualcodec_ext import ops, reference


def case(
    channels: int = 9,
    taps: int = 7,
    steps: int = 40,
    batch: int = 2,
    bias: bool = True,
    norm: bool = True,
    seed: int = 0,
    **options: Any,
) -> Case:
    gen = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen)

    return Case(
        ops.causal_dwconv1d,
        reference.causal_dwconv1d_ref,
        noise(batch, channels, steps),
        {
            "weight": noise(channels, taps) / taps**0.5,
            "bias": noise(channels) if bias else None,
            "ln_weight": 1 + 0.1 * noise(channels) if norm else None,
            "ln_bias": 0.1 * noise(channels) if norm else None,
        },
        options,
    )


SHAPES = {
    "plain": {"bias": False, "norm": False},
    "causal, LayerNorm": {},
    "centred": {"channels": 33, "padding": (3, 3)},
    "one tap": {"taps": 1},
    "K=31": {"taps": 31, "channels": 48},
    "K=64": {"taps": 64, "channels": 20, "norm": False},
    "wide padding": {"padding": (20, 9)},
    "one channel": {"channels": 1},
    "epsilon": {"eps": 0.5},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("isa", suite.instruction_sets())
def test_forward(shape: dict[str, Any], isa: str) -> None:
    with suite.instruction_set(isa):
        suite.check(case(**shape))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codec_shape(norm: bool, dtype: torch.dtype) -> None:
    suite.check_2x(case(768, steps=150, batch=1, norm=norm), dtype)


def test_layer_norm_of_a_large_mean() -> None:
    """The second pass keeps the variance when the mean is a thousand times larger."""
    made = case(channels=100, norm=True)
    made.x += 1000.0
    expected = made.expected()
    with torch.no_grad():
        baseline = (made.call(made.ref) - expected).abs().max()
    assert (made.actual() - expected).abs().max() <= 2 * baseline


def test_gradient() -> None:
    suite.check_gradients(case(4, 3, 9))
    suite.check_gradients(case(4, 3, 9, norm=False, padding=(1, 1)))
    suite.check_frozen_weights(case(4, 3, 9))
    suite.check_mixed_gradients(case(4, 3, 9))


@pytest.mark.parametrize("dtype", suite.DTYPES, ids=str)
@pytest.mark.parametrize("isa", suite.instruction_sets())
def test_dtypes(dtype: torch.dtype, isa: str) -> None:
    with suite.instruction_set(isa):
        suite.check(case(33), dtype)


def test_strides_and_slices() -> None:
    suite.check_layouts(case(19))


@pytest.mark.parametrize("steps", suite.EDGE_STEPS)
def test_edge_sizes(steps: int) -> None:
    suite.check(case(steps=steps))
    suite.check(case(steps=steps, padding=(0, 0)))
    suite.check(case(steps=steps, batch=0))


def test_lengths() -> None:
    suite.check_lengths(case(20, batch=4), [40, 0, 1, 17])
    suite.check_lengths(case(20, batch=3, padding=(3, 3), norm=False), [40, 8, 3])


@pytest.mark.parametrize(
    "change, text",
    [
        ({"x": torch.zeros(9, 40)}, r"x must be \[B, C, T\], got \[9, 40\]"),
        ({"weight": torch.zeros(8, 7)}, r"weight must be \[C, K\] with C = 9 and K in 1..64, got \[8, 7\]"),
        ({"weight": torch.zeros(9, 65)}, r"K in 1..64, got \[9, 65\]"),
        ({"bias": torch.zeros(8)}, r"bias must be \[C\] = \[9\], got \[8\]"),
        ({"ln_weight": torch.zeros(8)}, r"ln_weight must be \[C\] = \[9\], got \[8\]"),
        ({"ln_weight": None}, "ln_bias must come with ln_weight, got ln_bias alone"),
        ({"weight": None}, "weight must be a tensor, got NoneType"),
        ({"padding": (0, 0, 0)}, "padding must be two integers"),
        ({"lengths": torch.zeros(2, dtype=torch.int32)}, "lengths must be int64, got Int"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_errors(change: dict[str, Any], text: str) -> None:
    made = case()
    with pytest.raises(ValueError, match="causal_dwconv1d: .*" + text) as raised:
        ops.causal_dwconv1d(**{"x": made.x, **made.weights, **change})
    assert "\n" not in str(raised.value)


def test_opcheck() -> None:
    made = case(steps=20)
    w = [t.requires_grad_() for t in made.weights.values()]  # type: ignore[union-attr]
    x = made.x.requires_grad_()
    suite.check_opcheck("causal_dwconv1d", x, w[0], w[1], [6, 0], w[2], w[3], 1e-6, torch.tensor([20, 9]))
    last = made.x.detach().transpose(1, 2).contiguous().transpose(1, 2)
    suite.check_opcheck("causal_dwconv1d", last, w[0].detach(), None, [3, 3], None, None, 1e-6, None)


def test_compiles() -> None:
    suite.check_compiles(case())
    suite.check_compiles_dynamic(case(padding=(0, 1)))


def test_determinism() -> None:
    big = case(768, steps=700)
    suite.check_threads(big)
    suite.check_alone(big)


def test_a_cut_gives_the_same_bits() -> None:
    whole = case(40, steps=700)
    parts, context = [], torch.zeros(2, 40, 6)
    for piece in whole.x.split([1, 2, 300, 0, 397], dim=-1):
        x = torch.cat([context, piece], dim=-1)
        parts.append(ops.causal_dwconv1d(x, **whole.weights, padding=(0, 0)))
        context = x[..., -6:]
    assert torch.equal(torch.cat(parts, -1), whole.actual())


def test_nan_reaches_its_samples_alone() -> None:
    made = case(norm=False)
    made.x[1, 2, 10] = torch.nan
    y = made.actual()
    assert y[1, 2, 10:17].isnan().all() and int(y.isnan().sum()) == 7
