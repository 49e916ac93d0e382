"""snake_upsample1d in Triton: the compiled op's tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import opsuite as suite
import pytest
import test_snake_upsample1d as compiled
import torch
from opsuite import Case

from dualcodec_ext import ops, reference
from dualcodec_ext.ops import packing

MODES = ["transposed", "repeat"]


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
@pytest.mark.parametrize("mode", MODES)
def test_dtypes(case: Any, dtype: torch.dtype, mode: str) -> None:
    """Two tiles of frames and two blocks of columns, the last ones short."""
    suite.check(case(48, 33, 5, mode, 70), dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codec_shape(case: Any, mode: str, dtype: torch.dtype) -> None:
    suite.check_2x(case(96, 48, 4, mode, 530, batch=1), dtype)


@pytest.mark.parametrize("mode", MODES)
def test_wide_codec_shape(case: Any, mode: str) -> None:
    suite.check(case(768, 48, 2, mode, 9, batch=1))
    suite.check(case(192, 96, 5, mode, 66, batch=1), torch.bfloat16)


def test_snake_of_large_arguments(case: Any) -> None:
    """sin^2 of float32 arguments up to 1e4, then NaN where the argument is infinite."""
    made = case(16, 16, 1, padding=(1, 0), batch=1, steps=4000, bias=False)
    # Tap 1 of output t falls on frame t.
    made.weights["weight"] = torch.stack([torch.zeros(16, 16), torch.eye(16)], 2).to(made.x)
    made.x = torch.linspace(-1e4, 1e4, 64000).reshape(1, 16, 4000).to(made.x)
    made.weights["alpha"] = torch.ones(16).to(made.x)
    y, x = made.actual(), made.x.double()
    expected = x + torch.sin(x).square()
    # x itself is rounded to 1e4's ulp in the sum; the sine adds no more than that.
    assert y.shape == x.shape and float((y - expected).abs().max()) <= 1.01 * 2.0**-11
    far = torch.tensor([1e6, 1e8, 1e20, 3e38]).to(made.x)
    made.x = far.repeat(16, 1)[None]
    y = made.actual()
    assert ((y - made.x).abs() <= 1.01 + made.x * 2.0**-23).all()
    made.x[0, :, 1] = torch.inf
    y = made.actual()
    assert y[..., 1].isnan().all()


@pytest.mark.parametrize("mode", MODES)
def test_gradients(case: Any, mode: str) -> None:
    suite.check_frozen_weights(case(3, 4, 3, mode, 5))
    suite.check_mixed_gradients(case(3, 4, 3, mode, 5))


@pytest.mark.parametrize("mode", MODES)
def test_packed_gives_the_same_bits_and_reads_the_shape_alone(case: Any, mode: str) -> None:
    made = case(30, 20, 5, mode)
    weights = dict(made.weights)
    weight = weights["weight"]
    weights["weight"] = torch.zeros(1, device=weight.device).expand(weight.shape)
    packed = packing.pack_upsample1d(weight, 5, mode, made.options["padding"])
    assert torch.equal(ops.snake_upsample1d(made.x, **weights, **made.options, packed=packed), made.actual())
    half, x = weight.bfloat16(), made.x.bfloat16()
    packed = packing.pack_upsample1d(half, 5, mode, made.options["padding"])
    expected = ops.snake_upsample1d(x, **{**weights, "weight": half}, **made.options)
    assert packed.dtype == torch.bfloat16
    assert torch.equal(ops.snake_upsample1d(x, **weights, **made.options, packed=packed), expected)
    with pytest.raises(ValueError, match=r"packed must be a contiguous Float tensor of .* got BFloat"):
        ops.snake_upsample1d(made.x, **weights, **made.options, packed=packed)


def test_gradient_needs_plain_weights(case: Any) -> None:
    made = case()
    packed = packing.pack_upsample1d(made.weights["weight"], 4, "transposed", (2, 2))
    with pytest.raises(RuntimeError, match="snake_upsample1d: packed must be None when the input needs a gradient"):
        made.call(lambda x, **kw: ops.snake_upsample1d(x, **kw, packed=packed), x=made.x.clone().requires_grad_())


@pytest.mark.parametrize("mode", MODES)
def test_strides_and_slices(case: Any, mode: str) -> None:
    suite.check_layouts(case(19, 7, 3, mode))


@pytest.mark.parametrize("steps", [0, 1, 2, 6, 7, 63])
@pytest.mark.parametrize("mode", MODES)
def test_edge_sizes(case: Any, steps: int, mode: str) -> None:
    suite.check(case(mode=mode, steps=steps))
    suite.check(case(mode=mode, steps=steps, stride=3, padding=(0, 0)))
    suite.check(case(mode=mode, steps=steps, batch=0))


@pytest.mark.parametrize("mode", MODES)
def test_lengths(case: Any, mode: str) -> None:
    suite.check_lengths(case(20, 9, 5, mode, batch=4), [20, 0, 1, 13])
    suite.check_lengths(case(20, 9, 5, mode, batch=2), [20, 13], torch.bfloat16)


@pytest.mark.parametrize("mode", MODES)
def test_bits_do_not_depend_on_the_batch(case: Any, mode: str) -> None:
    suite.check_alone(case(48, 40, 4, mode, 70))


def test_a_cut_gives_the_same_bits(case: Any) -> None:
    """Two frames of context in front make a piece of a causal repeat equal the whole."""
    whole = case(40, 20, 5, "repeat", 70)
    parts, context = [], whole.x.new_zeros(2, 40, 2)
    for piece in whole.x.split([1, 2, 30, 37], dim=-1):
        x = torch.cat([context, piece], dim=-1)
        y = ops.snake_upsample1d(x, **whole.weights, stride=5, mode="repeat", padding=(9, 0))
        parts.append(y[..., 10:])
        context = x[..., -2:]
    assert torch.equal(torch.cat(parts, -1), whole.actual())


@pytest.mark.parametrize("mode", MODES)
def test_nan_reaches_its_samples_alone(case: Any, mode: str) -> None:
    """A phase without a third tap does not see the third frame: zero times NaN would be NaN."""
    made = case(stride=4, mode=mode)
    made.x[1, 2, 10] = torch.nan
    expected = reference.snake_upsample1d_ref(made.x, **made.weights, **made.options)
    assert torch.equal(made.actual().isnan(), expected.isnan()) and 0 < int(expected[1, 0].isnan().sum()) < 12


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
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"mode": "linear"}, "mode must be 'transposed' or 'repeat', got 'linear'"),
        ({"padding": (-1, 0)}, "padding must be two non-negative integers"),
        ({"lengths": torch.tensor([0, 21])}, r"lengths\[1\] must be in 0..20, got 21"),
        ({"packed": torch.zeros(3)}, r"packed must be a contiguous Float tensor of 240 elements, \[12, 20\],"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_errors(case: Any, device: str, change: dict[str, Any], text: str) -> None:
    made = case()
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(ValueError, match="snake_upsample1d: " + text) as raised:
        ops.snake_upsample1d(**{"x": made.x, **made.weights, **made.options, **moved})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("mode", MODES)
def test_opcheck(case: Any, mode: str) -> None:
    made = case(mode=mode)
    w = [t.requires_grad_() for t in made.weights.values()]
    pad, namespace = list(made.options["padding"]), "dualcodec_ext_triton"
    args = (made.x.requires_grad_(), *w, 4, mode, pad, torch.tensor([20, 9]), None)
    suite.check_opcheck("snake_upsample1d", *args, namespace=namespace)
    last = made.x.detach().transpose(1, 2).contiguous().transpose(1, 2)
    plain = [t.detach() for t in w]
    suite.check_opcheck("snake_upsample1d", last, *plain, 4, mode, pad, None, None, namespace=namespace)
    suite.check_opcheck("pack_upsample1d", plain[1], 4, mode, pad, namespace=namespace)


@pytest.mark.parametrize("mode", MODES)
def test_compiles(case: Any, mode: str) -> None:
    suite.check_compiles(case(mode=mode))
    suite.check_compiles_dynamic(case(stride=3, mode=mode, padding=(7, 7) if mode == "transposed" else (0, 1)))


def test_determinism(case: Any) -> None:
    made = case(48, 24, 4, "repeat", 70)
    assert torch.equal(made.actual(), made.actual())
