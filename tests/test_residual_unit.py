"""residual_unit: Snake, dilated convolution, Snake, 1x1, addition."""

from __future__ import annotations

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


def case(channels: int = 5, steps: int = 40, batch: int = 2, bias: bool = True, seed: int = 0, **options: Any) -> Case:
    gen = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen)

    return Case(
        ops.residual_unit,
        reference.residual_unit_ref,
        noise(batch, channels, steps),
        {
            "alpha1": (0.3 * noise(channels)).exp(),
            "weight1": noise(channels, channels, 7) / (7 * channels) ** 0.5,
            "bias1": 0.1 * noise(channels) if bias else None,
            "alpha2": (0.3 * noise(channels)).exp(),
            "weight2": noise(channels, channels, 1) / channels**0.5,
            "bias2": 0.1 * noise(channels) if bias else None,
        },
        options,
    )


SHAPES = {
    "plain": {"bias": False},
    "dilation 3": {"channels": 17, "dilation": 3},
    "dilation 9": {"channels": 48, "dilation": 9},
    "causal": {"channels": 20, "dilation": 3, "causal": True},
    "no padding": {"channels": 33, "padding": (0, 0)},
    "no padding, causal": {"channels": 16, "padding": (0, 0), "causal": True, "dilation": 2},
    "lopsided padding": {"padding": (10, 1), "dilation": 2},
    "more than a panel": {"channels": 100},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("isa", suite.instruction_sets())
def test_forward(shape: dict[str, Any], isa: str) -> None:
    with suite.instruction_set(isa):
        suite.check(case(**shape))


@pytest.mark.parametrize(
    "channels, steps, dilation",
    [(768, 250, 1), (384, 300, 9), (192, 1000, 3), (96, 2000, 9), (48, 4000, 9), (32, 4000, 1)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codec_shapes(channels: int, steps: int, dilation: int, dtype: torch.dtype) -> None:
    suite.check_2x(case(channels, steps, batch=1, dilation=dilation), dtype)


@pytest.mark.parametrize("options", [{}, {"causal": True, "dilation": 2}, {"padding": (1, 7)}], ids=str)
def test_gradient(options: dict[str, Any]) -> None:
    suite.check_gradients(case(3, 15, **options))
    suite.check_frozen_weights(case(3, 15, **options))
    suite.check_mixed_gradients(case(3, 15, **options))


def test_gradient_needs_plain_weights() -> None:
    made = case()
    packed = packing.pack_residual_unit(made.weights["weight1"], made.weights["weight2"])
    with pytest.raises(RuntimeError, match="residual_unit: packed must be None when the input needs a gradient"):
        ops.residual_unit(made.x.clone().requires_grad_(), **made.weights, packed=packed)


def test_packed_gives_the_same_bits_and_reads_the_shapes_alone() -> None:
    made = case(30)
    weights = dict(made.weights)
    packed = packing.pack_residual_unit(weights["weight1"], weights["weight2"])
    for name in ("weight1", "weight2"):
        weights[name] = torch.zeros(1).expand(weights[name].shape)
    assert torch.equal(ops.residual_unit(made.x, **weights, packed=packed), made.actual())


@pytest.mark.parametrize("dtype", suite.DTYPES, ids=str)
@pytest.mark.parametrize("isa", suite.instruction_sets())
def test_dtypes(dtype: torch.dtype, isa: str) -> None:
    with suite.instruction_set(isa):
        suite.check(case(33, dilation=3), dtype)


def test_strides_and_slices() -> None:
    suite.check_layouts(case(19, dilation=3))


@pytest.mark.parametrize("steps", suite.EDGE_STEPS)
def test_edge_sizes(steps: int) -> None:
    suite.check(case(steps=steps, dilation=9))
    suite.check(case(steps=steps, padding=(0, 0)))
    suite.check(case(steps=steps, batch=0))


def test_lengths() -> None:
    suite.check_lengths(case(20, batch=4, dilation=3), [40, 0, 1, 17])
    suite.check_lengths(case(20, batch=3, causal=True), [40, 8, 3])


@pytest.mark.parametrize(
    "change, text",
    [
        ({"x": torch.zeros(5, 40)}, r"x must be \[B, C, T\], got \[5, 40\]"),
        ({"x": torch.zeros(2, 0, 40)}, r"x must have at least one channel, got \[2, 0, 40\]"),
        ({"alpha1": torch.zeros(6)}, r"alpha1 must be \[C\] = \[5\], got \[6\]"),
        ({"weight1": torch.zeros(5, 5, 3)}, r"weight1 must be \[C, C, 7\] = \[5, 5, 7\], got \[5, 5, 3\]"),
        ({"weight2": torch.zeros(5, 5)}, r"weight2 must be \[C, C, 1\] = \[5, 5, 1\], got \[5, 5\]"),
        (
            {"bias2": torch.zeros(5, dtype=torch.int32)},
            "bias2 must be float32, float64, bfloat16 or float16, got Int",
        ),
        ({"x": [[0.0]]}, "x must be a tensor, got list"),
        ({"dilation": 1.0}, "dilation must be an integer, got 1.0"),
        ({"dilation": 0}, "dilation must be at least 1, got 0"),
        ({"padding": (0, -3)}, "padding must be two non-negative integers"),
        ({"lengths": torch.tensor([0, -1])}, r"lengths\[1\] must be in 0..40, got -1"),
        ({"packed": torch.zeros(3)}, "packed must be a contiguous Float tensor of 640 elements"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_errors(change: dict[str, Any], text: str) -> None:
    made = case()
    with pytest.raises(ValueError, match="residual_unit: " + text) as raised:
        ops.residual_unit(**{"x": made.x, **made.weights, **change})
    assert "\n" not in str(raised.value)


def test_opcheck() -> None:
    made = case(steps=20)
    w = [t.requires_grad_() for t in made.weights.values()]  # type: ignore[union-attr]
    suite.check_opcheck("residual_unit", made.x.requires_grad_(), *w, 1, [3, 3], False, torch.tensor([20, 9]), None)
    last = made.x.detach().transpose(1, 2).contiguous().transpose(1, 2)
    suite.check_opcheck("residual_unit", last, *[t.detach() for t in w], 3, [18, 0], True, None, None)


def test_compiles() -> None:
    suite.check_compiles(case(dilation=3))
    suite.check_compiles_dynamic(case(padding=(1, 0)))


def test_determinism() -> None:
    big = case(96, 5000, dilation=9)
    suite.check_threads(big)
    suite.check_alone(big)


@pytest.mark.parametrize("dtype", suite.DTYPES, ids=str)
def test_few_rows(dtype: torch.dtype) -> None:
    suite.check_few_rows(case(100, 2, batch=70, dilation=3), dtype)
    suite.check_lengths(case(100, 2, batch=3), [2, 0, 1], dtype)


@pytest.mark.parametrize("causal", [False, True])
def test_a_cut_gives_the_same_bits(causal: bool) -> None:
    """With 6d context rows in front and no padding, a piece gives what the whole gives there."""
    whole = case(40, 700, dilation=3, causal=causal, padding=(18, 0))
    parts, context = [], torch.zeros(2, 40, 18)
    for piece in whole.x.split([1, 2, 300, 0, 397], dim=-1):
        x = torch.cat([context, piece], dim=-1)
        parts.append(ops.residual_unit(x, **whole.weights, dilation=3, causal=causal, padding=(0, 0)))
        context = x[..., -18:]
    assert torch.equal(torch.cat(parts, -1), whole.actual())


def test_nan_reaches_its_samples_alone() -> None:
    made = case(steps=60, dilation=3)
    made.x[1, 2, 30] = torch.nan
    y = made.actual()
    reached = [30 + 3 * k for k in range(-3, 4)]
    assert y[1][:, reached].isnan().all() and not y[0].isnan().any()
    others = [t for t in range(60) if t not in reached]
    assert not y[1][:, others].isnan().any()


def test_snake_on_the_output_is_a_gpus() -> None:
    """The kernels of the CPU have none; plain PyTorch's gradient knows it too."""
    made, alpha = case(), torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0])
    with pytest.raises(ValueError, match=r"residual_unit: out_alpha must be None on the CPU, got \[5\]"):
        ops.residual_unit(made.x, **made.weights, out_alpha=alpha)
    alpha.requires_grad_()
    with dx.backend("reference"):
        y = ops.residual_unit(made.x, **made.weights, out_alpha=alpha)
        plain = ops.residual_unit(made.x, **made.weights)
    expected = reference.snake_conv1d_ref(plain, torch.eye(5)[..., None], alpha=alpha)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)
    y.sum().backward()
    assert alpha.grad is not None and bool(alpha.grad.any())


def test_a_pair_is_a_gpus() -> None:
    """So is a signal that comes through the first Snake; plain PyTorch has both, and their gradients."""
    made, alpha = case(), torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0])
    snaked = snake(made.x, made.weights["alpha1"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"residual_unit: snaked must be None on the CPU, got \[2, 5, 40\]"):
        ops.residual_unit(made.x, **made.weights, snaked=snaked)
    with pytest.raises(ValueError, match="residual_unit_pair: x must be on a CUDA device, got cpu"):
        ops.residual_unit_pair(made.x, **made.weights, out_alpha=alpha)
    with pytest.raises(ValueError, match="residual_unit_pair: out_alpha must be a tensor, got NoneType"):
        ops.residual_unit_pair(made.x, **made.weights, out_alpha=None)  # type: ignore[arg-type]
    lengths = torch.tensor([40, 7])
    with dx.backend("reference"):
        plain = ops.residual_unit(made.x, **made.weights, lengths=lengths)
        handed = ops.residual_unit(made.x, **made.weights, lengths=lengths, out_alpha=alpha)
        snaked[1, :, 7:] = torch.nan
        snaked.requires_grad_()
        y, y_snaked = ops.residual_unit_pair(made.x, **made.weights, lengths=lengths, out_alpha=alpha, snaked=snaked)
    assert torch.equal(y, plain) and torch.equal(y_snaked, handed)
    (y + y_snaked).sum().backward()
    assert snaked.grad is not None and snaked.grad[0].abs().min() > 0 and not snaked.grad[1, :, 7:].any()


def test_a_pairs_fake() -> None:
    """As of the op twice; the kernels are a GPU's."""
    made = case(20)
    for x in (made.x, made.x.transpose(1, 2).contiguous().transpose(1, 2)):
        args = [t.to("meta") for t in (x, *made.weights.values())]  # type: ignore[union-attr]
        args += [3, (20, 1), False, None, None, 0]
        y = torch.ops.dualcodec_ext.residual_unit(*args)
        for made_y in torch.ops.dualcodec_ext.residual_unit_pair(*args, args[1], x.to("meta")):
            assert (made_y.shape, made_y.dtype, made_y.stride()) == (y.shape, y.dtype, y.stride())
