"""snake_conv1d: Snake, convolution with stride and dilation, activation, residual."""

from __future__ import annotations

from typing import Any

import opsuite as suite
import pytest
import torch
from opsuite import Case
from torch import Tensor

from dualcodec_ext import ops, reference
from dualcodec_ext.ops import packing


def case(
    cin: int = 5,
    cout: int = 7,
    taps: int = 3,
    steps: int = 40,
    batch: int = 2,
    snake: bool = True,
    bias: bool = True,
    residual: bool = False,
    seed: int = 0,
    **options: Any,
) -> Case:
    gen = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen)

    made = Case(
        ops.snake_conv1d,
        reference.snake_conv1d_ref,
        noise(batch, cin, steps),
        {
            "weight": noise(cout, cin, taps) / (cin * taps) ** 0.5,
            "bias": noise(cout) if bias else None,
            "alpha": (0.3 * noise(cin)).exp() if snake else None,
        },
        options,
    )
    if residual:
        steps_out = made.call(made.ref).shape[-1]
        made.weights["residual"] = noise(batch, cout, steps_out)
    return made


SHAPES = {
    "plain": {"snake": False, "bias": False},
    "centred k7": {"taps": 7, "padding": (3, 3)},
    "causal dilated": {"taps": 7, "dilation": 9, "padding": (54, 0)},
    "strided": {"taps": 8, "stride": 4, "padding": (2, 2)},
    "odd stride": {"taps": 10, "stride": 5, "padding": (3, 3), "cin": 33, "cout": 50},
    "one in": {"cin": 1, "cout": 32, "taps": 7, "padding": (3, 3), "snake": False},
    "one in, snake, dilated": {"cin": 1, "taps": 3, "dilation": 2},
    "one out, tanh": {"cin": 48, "cout": 1, "taps": 7, "padding": (3, 3), "activation": "tanh"},
    "one to one": {"cin": 1, "cout": 1, "taps": 4, "snake": False},
    "gelu and residual": {"cin": 24, "cout": 50, "taps": 1, "activation": "gelu", "residual": True},
    "more than a panel": {"cin": 17, "cout": 100, "taps": 2, "padding": (0, 5)},
    "long reduction": {"cin": 600, "cout": 33, "taps": 3, "steps": 9},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("isa", suite.instruction_sets())
def test_forward(shape: dict[str, Any], isa: str) -> None:
    with suite.instruction_set(isa):
        suite.check(case(**shape))


@pytest.mark.parametrize(
    "shape",
    [
        {"cin": 1024, "cout": 1536, "taps": 7, "padding": (3, 3), "snake": False, "steps": 70, "batch": 1},
        {
            "cin": 48,
            "cout": 1,
            "taps": 7,
            "padding": (3, 3),
            "activation": "tanh",
            "steps": 100_000,
            "batch": 1,
        },
        {"cin": 1, "cout": 32, "taps": 7, "padding": (3, 3), "snake": False, "steps": 4000, "batch": 1},
        {"cin": 512, "cout": 1024, "taps": 4, "stride": 2, "padding": (1, 1), "steps": 200, "batch": 1},
        {"cin": 768, "cout": 2048, "taps": 1, "activation": "gelu", "snake": False, "steps": 50, "batch": 1},
    ],
    ids=["decoder first", "decoder last", "encoder first", "encoder stride 2", "convnext"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codec_shapes(shape: dict[str, Any], dtype: torch.dtype) -> None:
    suite.check_2x(case(**shape), dtype)


@pytest.mark.parametrize(
    "shape",
    [
        {"taps": 3, "stride": 2, "padding": (2, 1)},
        {"activation": "tanh"},
        {"activation": "gelu", "residual": True},
    ],
    ids=["strided", "tanh", "gelu and residual"],
)
def test_gradient(shape: dict[str, Any]) -> None:
    suite.check_gradients(case(cin=3, cout=4, steps=9, **shape))
    suite.check_frozen_weights(case(steps=9, **shape))
    suite.check_mixed_gradients(case(cin=3, cout=4, steps=9, **shape))


def test_gradient_needs_plain_weights() -> None:
    made = case()
    packed = packing.pack_conv1d(made.weights["weight"])
    x = made.x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="snake_conv1d: packed must be None when the input needs a gradient"):
        ops.snake_conv1d(x, **made.weights, packed=packed)


def test_packed_gives_the_same_bits_and_reads_the_shape_alone() -> None:
    made = case(taps=4, cin=30)
    weights = dict(made.weights)
    packed = packing.pack_conv1d(weights["weight"])
    weights["weight"] = torch.zeros(1).expand(weights["weight"].shape)
    assert torch.equal(ops.snake_conv1d(made.x, **weights, packed=packed), made.actual())


@pytest.mark.parametrize("dtype", suite.DTYPES, ids=str)
@pytest.mark.parametrize("isa", suite.instruction_sets())
def test_dtypes(dtype: torch.dtype, isa: str) -> None:
    with suite.instruction_set(isa):
        suite.check(case(cin=20, cout=33, taps=7, dilation=3, padding=(9, 9), residual=True), dtype)


def test_strides_and_slices() -> None:
    suite.check_layouts(case(cin=19, taps=7, padding=(3, 3)))


@pytest.mark.parametrize("steps", suite.EDGE_STEPS)
def test_edge_sizes(steps: int) -> None:
    suite.check(case(taps=7, padding=(3, 3), steps=steps))
    suite.check(case(taps=7, dilation=3, steps=steps))
    suite.check(case(taps=8, stride=4, padding=(2, 2), steps=steps, batch=0))


def test_lengths() -> None:
    suite.check_lengths(case(taps=7, padding=(3, 3), batch=4), [40, 0, 1, 17])
    suite.check_lengths(case(taps=8, stride=4, padding=(2, 2), batch=3, cin=20), [40, 8, 3])


@pytest.mark.parametrize(
    "change, text",
    [
        ({"x": torch.zeros(5, 40)}, r"x must be \[B, C, T\], got \[5, 40\]"),
        (
            {"x": torch.zeros(2, 5, 40, dtype=torch.int64)},
            "x must be float32, float64, bfloat16 or float16, got Long",
        ),
        ({"weight": torch.zeros(7, 4, 3)}, r"weight must be \[Cout, Cin, K\] with Cin = 5, got \[7, 4, 3\]"),
        ({"weight": torch.zeros(0, 5, 3)}, r"weight must not be empty, got \[0, 5, 3\]"),
        ({"bias": torch.zeros(6)}, r"bias must be \[C\] = \[7\], got \[6\]"),
        ({"alpha": torch.zeros(6)}, r"alpha must be \[C\] = \[5\], got \[6\]"),
        ({"alpha": 1.0}, "alpha must be a tensor, got float"),
        ({"stride": 1.0}, "stride must be an integer, got 1.0"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"dilation": 0}, "dilation must be at least 1, got 0"),
        ({"padding": (-1, 0)}, "padding must be two non-negative integers"),
        ({"padding": 3}, "padding must be two integers"),
        ({"activation": "relu"}, "activation must be 'none', 'tanh' or 'gelu', got 'relu'"),
        (
            {"residual": torch.zeros(2, 7, 1)},
            r"residual must be \[B, Cout, T'\] = \[2, 7, 38\], got \[2, 7, 1\]",
        ),
        ({"lengths": torch.zeros(3, dtype=torch.int64)}, r"lengths must be \[B\] = \[2\], got \[3\]"),
        ({"lengths": torch.zeros(2)}, "lengths must be int64, got Float"),
        ({"lengths": torch.tensor([0, 41])}, r"lengths\[1\] must be in 0..40, got 41"),
        ({"packed": torch.zeros(3)}, "packed must be a contiguous Float tensor of 240 elements"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_errors(change: dict[str, Any], text: str) -> None:
    made = case()
    with pytest.raises(ValueError, match="snake_conv1d: " + text) as raised:
        ops.snake_conv1d(**{"x": made.x, **made.weights, **change})
    assert "\n" not in str(raised.value)


def test_opcheck() -> None:
    made = case(taps=8, stride=4, padding=(2, 2), residual=True)
    w = [t.requires_grad_() for t in (made.weights["weight"], made.weights["bias"], made.weights["alpha"])]  # type: ignore[union-attr]
    residual = made.weights["residual"].requires_grad_()  # type: ignore[union-attr]
    suite.check_opcheck(
        "snake_conv1d",
        made.x.requires_grad_(),
        *w,
        4,
        1,
        [2, 2],
        "gelu",
        residual,
        torch.tensor([40, 9]),
        None,
    )
    last = made.x.detach().transpose(1, 2).contiguous().transpose(1, 2)
    suite.check_opcheck("snake_conv1d", last, w[0].detach(), None, None, 4, 1, [2, 2], "none", None, None, None)
    suite.check_opcheck("pack_conv1d", w[0].detach())


def test_compiles() -> None:
    suite.check_compiles(case(taps=7, padding=(3, 3)))
    suite.check_compiles_dynamic(case(taps=7, stride=2))


def test_determinism() -> None:
    big = case(cin=64, cout=96, taps=7, padding=(3, 3), steps=5000, batch=2)
    suite.check_threads(big)
    suite.check_alone(big)


@pytest.mark.parametrize("dtype", suite.DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{"taps": 7, "padding": (6, 0)}, {"taps": 4, "stride": 2, "padding": (1, 1)}, {"taps": 1, "activation": "gelu"}],
    ids=str,
)
def test_few_rows(options: dict[str, Any], dtype: torch.dtype) -> None:
    suite.check_few_rows(case(cin=30, cout=100, steps=2, batch=70, **options), dtype)
    suite.check_lengths(case(cin=30, cout=100, steps=3, batch=3, **options), [3, 0, 1], dtype)


def test_a_cut_gives_the_same_bits() -> None:
    whole = case(cin=40, taps=7, dilation=3, padding=(18, 0), steps=700)
    y = whole.actual()
    parts, context = [], torch.zeros(2, 40, 18)
    for piece in whole.x.split([1, 2, 300, 0, 397], dim=-1):
        x = torch.cat([context, piece], dim=-1)
        parts.append(ops.snake_conv1d(x, **whole.weights, dilation=3))
        context = x[..., -18:]
    assert torch.equal(torch.cat(parts, -1), y)


def test_nan_reaches_its_samples_alone() -> None:
    made = case(taps=3, padding=(1, 1), dilation=1, steps=30)
    made.x[1, 2, 10] = torch.nan
    y = made.actual()
    assert y[1, :, 9:12].isnan().all() and not y[0].isnan().any()
    assert not y[1, :, :9].isnan().any() and not y[1, :, 12:].isnan().any()


@pytest.mark.parametrize("isa", suite.instruction_sets())
def test_snake_range(isa: str) -> None:
    """alpha * x up to 1e4 by polynomial, beyond by libm; infinity and NaN become NaN."""
    x = torch.cat([torch.linspace(-1e4, 1e4, 20001), torch.tensor([1.2e4, -3e5, 1e8, 3e38])]).reshape(1, 1, -1)
    alpha, weight = torch.tensor([1.0]), torch.ones(1, 1, 1)
    with suite.instruction_set(isa):
        y = ops.snake_conv1d(x, weight, alpha=alpha)
        expected = reference.snake_conv1d_ref(x.double(), weight.double(), alpha=alpha.double())
        assert ((y - expected).abs() <= 1.5 * torch.finfo(torch.float32).eps * (1 + expected.abs())).all()
        odd = ops.snake_conv1d(torch.tensor([[[torch.inf, -torch.inf, torch.nan, 1.0]]]), weight, alpha=alpha)
    assert odd[0, 0, :3].isnan().all() and odd[0, 0, 3].isfinite()
