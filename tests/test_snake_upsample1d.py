"""snake_upsample1d: Snake, then a transposed or a nearest-repeat convolution, phase by phase."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import opsuite as suite
import pytest
import torch
from opsuite import Case
from torch import Tensor

import dualcodec_ext as dx
from dualcodec_ext import ops, reference
from dualcodec_ext.ops import packing
from dualcodec_ext.reference.ops import snake


def case(
    cin: int = 6,
    cout: int = 5,
    stride: int = 4,
    mode: str = "transposed",
    steps: int = 20,
    batch: int = 2,
    bias: bool = True,
    padding: tuple[int, int] | None = None,
    seed: int = 0,
) -> Case:
    gen = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen)

    shape = (cin, cout, 2 * stride) if mode == "transposed" else (cout, cin, 2 * stride)
    scale = (2 * cin) ** -0.5 if mode == "transposed" else (2 * stride * cin) ** -0.5
    if padding is None:  # as the codec's layers have them
        left = math.ceil(stride / 2)
        padding = (left, left) if mode == "transposed" else (2 * stride - 1, 0)
    return Case(
        ops.snake_upsample1d,
        reference.snake_upsample1d_ref,
        noise(batch, cin, steps),
        {
            "alpha": (0.3 * noise(cin)).exp(),
            "weight": scale * noise(*shape),
            "bias": noise(cout) if bias else None,
        },
        {"stride": stride, "mode": mode, "padding": padding},
    )


SHAPES = {
    "transposed 2": {"stride": 2},
    "transposed odd": {"stride": 5, "cin": 33},
    "transposed 1": {"stride": 1, "bias": False},
    "transposed, wide crop": {"stride": 3, "padding": (4, 1)},
    "transposed, no crop": {"stride": 8, "padding": (0, 0), "cout": 50},
    "repeat causal": {"mode": "repeat"},
    "repeat causal odd": {"mode": "repeat", "stride": 5, "cin": 20, "cout": 33},
    "repeat look-ahead": {"mode": "repeat", "stride": 6, "padding": (3, 8)},
    "repeat, no padding": {"mode": "repeat", "stride": 3, "padding": (0, 0)},
    "repeat 1": {"mode": "repeat", "stride": 1},
    "repeat, wide padding": {"mode": "repeat", "stride": 2, "padding": (9, 7)},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("isa", suite.instruction_sets())
def test_forward(shape: dict[str, Any], isa: str) -> None:
    with suite.instruction_set(isa):
        suite.check(case(**shape))


def test_transposed_is_torchs() -> None:
    made = case(stride=5)
    module = torch.nn.ConvTranspose1d(6, 5, 10, stride=5, padding=3)
    x = reference.snake_conv1d_ref(made.x, torch.eye(6)[..., None], alpha=made.weights["alpha"])
    with torch.no_grad():
        module.weight.copy_(made.weights["weight"])
        module.bias.copy_(made.weights["bias"])
        torch.testing.assert_close(made.actual(), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["transposed", "repeat"])
@pytest.mark.parametrize("cin, stride, steps", [(1536, 2, 80), (768, 8, 35), (384, 6, 90), (192, 5, 210), (96, 4, 530)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codec_shapes(mode: str, cin: int, stride: int, steps: int, dtype: torch.dtype) -> None:
    suite.check_2x(case(cin, cin // 2, stride, mode, steps, batch=1), dtype)


@pytest.mark.parametrize("mode", ["transposed", "repeat"])
def test_gradient(mode: str) -> None:
    suite.check_gradients(case(3, 4, 3, mode, 5))
    suite.check_frozen_weights(case(3, 4, 3, mode, 5))
    suite.check_mixed_gradients(case(3, 4, 3, mode, 5))


def test_gradient_needs_plain_weights() -> None:
    made = case()
    packed = packing.pack_upsample1d(made.weights["weight"], 4, "transposed", (2, 2))
    with pytest.raises(RuntimeError, match="snake_upsample1d: packed must be None when the input needs a gradient"):
        made.call(lambda x, **kw: ops.snake_upsample1d(x, **kw, packed=packed), x=made.x.clone().requires_grad_())


@pytest.mark.parametrize("mode", ["transposed", "repeat"])
def test_packed_gives_the_same_bits_and_reads_the_shape_alone(mode: str) -> None:
    made = case(30, 20, 5, mode)
    weights = dict(made.weights)
    packed = packing.pack_upsample1d(weights["weight"], 5, mode, made.options["padding"])
    weights["weight"] = torch.zeros(1).expand(weights["weight"].shape)
    assert torch.equal(ops.snake_upsample1d(made.x, **weights, **made.options, packed=packed), made.actual())


@pytest.mark.parametrize("dtype", suite.DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["transposed", "repeat"])
@pytest.mark.parametrize("isa", suite.instruction_sets())
def test_dtypes(dtype: torch.dtype, mode: str, isa: str) -> None:
    with suite.instruction_set(isa):
        suite.check(case(20, 33, 5, mode), dtype)


@pytest.mark.parametrize("mode", ["transposed", "repeat"])
def test_strides_and_slices(mode: str) -> None:
    suite.check_layouts(case(19, 7, 3, mode))


@pytest.mark.parametrize("steps", suite.EDGE_STEPS)
@pytest.mark.parametrize("mode", ["transposed", "repeat"])
def test_edge_sizes(steps: int, mode: str) -> None:
    suite.check(case(mode=mode, steps=steps))
    suite.check(case(mode=mode, steps=steps, stride=3, padding=(0, 0)))
    suite.check(case(mode=mode, steps=steps, batch=0))


@pytest.mark.parametrize("mode", ["transposed", "repeat"])
def test_lengths(mode: str) -> None:
    suite.check_lengths(case(20, 9, 5, mode, batch=4), [20, 0, 1, 13])


@pytest.mark.parametrize(
    "change, text",
    [
        ({"x": torch.zeros(6, 40)}, r"x must be \[B, C, T\], got \[6, 40\]"),
        ({"x": torch.zeros(2, 5, 40)}, r"weight must have Cin = 5 as x does, got \[6, 5, 8\]"),
        ({"alpha": torch.zeros(7)}, r"alpha must be \[C\] = \[6\], got \[7\]"),
        (
            {"weight": torch.zeros(6, 5, 7)},
            r"weight must be \[Cin, Cout, 2 \* stride\] with stride 4, got \[6, 5, 7\]",
        ),
        ({"weight": torch.zeros(5, 6, 7), "mode": "repeat"}, r"weight must be \[Cout, Cin, 2 \* stride\]"),
        ({"bias": torch.zeros(6)}, r"bias must be \[C\] = \[5\], got \[6\]"),
        ({"alpha": 1.0}, "alpha must be a tensor, got float"),
        ({"stride": True}, "stride must be an integer, got True"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"mode": "linear"}, "mode must be 'transposed' or 'repeat', got 'linear'"),
        ({"padding": (-1, 0)}, "padding must be two non-negative integers"),
        ({"lengths": torch.tensor([0, 21])}, r"lengths\[1\] must be in 0..20, got 21"),
        ({"packed": torch.zeros(3)}, "packed must be a contiguous Float tensor of 768 elements"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_errors(change: dict[str, Any], text: str) -> None:
    made = case()
    with pytest.raises(ValueError, match="snake_upsample1d: " + text) as raised:
        ops.snake_upsample1d(**{"x": made.x, **made.weights, **made.options, **change})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("mode", ["transposed", "repeat"])
def test_opcheck(mode: str) -> None:
    made = case(mode=mode)
    w = [t.requires_grad_() for t in made.weights.values()]  # type: ignore[union-attr]
    pad = list(made.options["padding"])
    suite.check_opcheck("snake_upsample1d", made.x.requires_grad_(), *w, 4, mode, pad, torch.tensor([20, 9]), None)
    last = made.x.detach().transpose(1, 2).contiguous().transpose(1, 2)
    suite.check_opcheck("snake_upsample1d", last, *[t.detach() for t in w], 4, mode, pad, None, None)
    suite.check_opcheck("pack_upsample1d", w[1].detach(), 4, mode, pad)


@pytest.mark.parametrize("mode", ["transposed", "repeat"])
def test_compiles(mode: str) -> None:
    suite.check_compiles(case(mode=mode))
    suite.check_compiles_dynamic(case(stride=3, mode=mode, padding=(7, 7) if mode == "transposed" else (0, 1)))


@pytest.mark.parametrize("mode", ["transposed", "repeat"])
def test_determinism(mode: str) -> None:
    big = case(96, 48, 4, mode, 3000)
    suite.check_threads(big)
    suite.check_alone(big)


@pytest.mark.parametrize("dtype", suite.DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["transposed", "repeat"])
def test_few_rows(mode: str, dtype: torch.dtype) -> None:
    suite.check_few_rows(case(30, 100, 3, mode, steps=2, batch=70), dtype)
    suite.check_lengths(case(30, 100, 5, mode, steps=3, batch=3), [3, 0, 1], dtype)


def test_a_cut_gives_the_same_bits() -> None:
    """One frame of context in front makes a piece of a causal repeat equal the whole."""
    whole = case(40, 20, 5, "repeat", 70)
    parts, context = [], torch.zeros(2, 40, 2)
    for piece in whole.x.split([1, 2, 30, 37], dim=-1):
        x = torch.cat([context, piece], dim=-1)
        y = ops.snake_upsample1d(x, **whole.weights, stride=5, mode="repeat", padding=(9, 0))
        parts.append(y[..., 10:])
        context = x[..., -2:]
    assert torch.equal(torch.cat(parts, -1), whole.actual())


def test_nan_reaches_its_samples_alone() -> None:
    made = case(stride=4)
    made.x[1, 2, 10] = torch.nan
    y = made.actual()
    assert y[1, :, 38:46].isnan().all() and not y[0].isnan().any()
    assert not y[1, :, :38].isnan().any() and not y[1, :, 46:].isnan().any()


@pytest.mark.parametrize("mode", ["transposed", "repeat"])
def test_without_snake(mode: str) -> None:
    made = case(mode=mode)
    suite.check(replace(made, weights={**made.weights, "alpha": None}))


@pytest.mark.parametrize("mode", ["transposed", "repeat"])
def test_a_pair_is_a_gpus(mode: str) -> None:
    """Plain PyTorch has it; the fake is the op's, twice."""
    made, alpha, lengths = case(mode=mode), torch.linspace(0.2, 3, 5), torch.tensor([20, 7])
    with pytest.raises(ValueError, match="snake_upsample1d_pair: x must be on a CUDA device, got cpu"):
        ops.snake_upsample1d_pair(made.x, **made.weights, **made.options, out_alpha=alpha)
    with pytest.raises(ValueError, match="snake_upsample1d_pair: padding must be two integers"):
        ops.snake_upsample1d_pair(made.x, **made.weights, out_alpha=alpha, padding=(1,))
    with dx.backend("reference"):
        plain = ops.snake_upsample1d(made.x, **made.weights, **made.options, lengths=lengths)
        y, snaked = ops.snake_upsample1d_pair(made.x, **made.weights, **made.options, lengths=lengths, out_alpha=alpha)
    assert torch.equal(y, plain) and torch.equal(snaked, snake(plain, alpha))
    w = made.weights
    args = [None if t is None else t.to("meta") for t in (made.x, w["alpha"], w["weight"], w["bias"])]
    args += [*made.options.values(), None, None, 0]
    y = torch.ops.dualcodec_ext.snake_upsample1d(*args)
    for made_y in torch.ops.dualcodec_ext.snake_upsample1d_pair(*args, alpha.to("meta")):
        assert (made_y.shape, made_y.dtype, made_y.stride()) == (y.shape, y.dtype, y.stride())
