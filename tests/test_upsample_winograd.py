"""snake_upsample1d's Winograd form: 4 products for 3 frames of a transposed convolution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import opsuite as suite
import pytest
import torch
from test_snake_upsample1d import case as direct_case
from tolerances import TOLERANCE

from dualcodec_ext import ops, testing
from dualcodec_ext.ops import packing

TRANSPOSED = {
    "stride 2": {"stride": 2},
    "odd stride": {"stride": 5, "cin": 33},
    "stride 1": {"stride": 1, "bias": False},
    "wide crop": {"stride": 3, "padding": (4, 1)},
    "no crop": {"stride": 8, "padding": (0, 0), "cout": 50},
    "whole registers": {"cin": 48, "cout": 32, "stride": 4, "steps": 50},
    "more than a panel": {"cin": 96, "cout": 112, "stride": 3, "steps": 100},
    "long": {"cin": 32, "cout": 16, "steps": 400},
}


def case(*sizes: Any, **options: Any) -> suite.Case:
    made = direct_case(*sizes, **options)
    made.options["winograd"] = 4
    return made


def check(made: suite.Case, dtype: torch.dtype = torch.float32) -> None:
    direct = {k: v for k, v in made.options.items() if k != "winograd"}
    expected = replace(made, options=direct).expected(dtype)
    testing.assert_close(made.actual(dtype), expected, TOLERANCE["snake_upsample1d", dtype])


def channels_last(made: suite.Case) -> suite.Case:
    return replace(made, x=made.x.transpose(1, 2).contiguous().transpose(1, 2))


# What this form and the one by differences (test_upsample_differences.py) are held to alike; `case` makes either.


def check_wrong_tap(made: suite.Case, tap: int) -> None:
    expected = replace(made, options={k: v for k, v in made.options.items() if k != "winograd"})
    wrong = made.weights["weight"].clone()  # type: ignore[union-attr]
    wrong[3, 5, tap] += 0.05
    expected.weights = {**made.weights, "weight": wrong}
    with pytest.raises(AssertionError):
        testing.assert_close(
            made.actual(), expected.expected(torch.float32), TOLERANCE["snake_upsample1d", torch.float32]
        )


def check_edge_sizes(case: Callable[..., suite.Case], steps: int, padding: tuple[int, int]) -> None:
    check(case(steps=steps))
    check(channels_last(case(16, 32, steps=steps)))
    check(case(stride=2, padding=padding, steps=steps, batch=0))


def check_lengths(case: Callable[..., suite.Case]) -> None:
    suite.check_lengths(case(20, batch=4), [20, 0, 1, 17])
    suite.check_lengths(channels_last(case(16, 32, 3, steps=200, batch=4)), [200, 0, 100, 199])


def check_determinism(case: Callable[..., suite.Case], few: int) -> None:
    """Of 140 short clips `few` are split by columns; all are by time, with the same bits."""
    clips = case(100, 48, 3, steps=150, batch=3)
    suite.check_threads(clips)
    suite.check_alone(clips)
    suite.check_threads(replace(clips, x=clips.x[:1]))
    short = case(30, 100, 3, steps=2, batch=140)
    assert torch.equal(replace(short, x=short.x[:few]).actual(), short.actual()[:few])


def check_packed(made: suite.Case, mode: str, products: int) -> None:
    """The same bits; of the weight nothing but its shape is then read."""
    weights = dict(made.weights)
    packed = packing.pack_upsample1d(weights["weight"], 5, mode, made.options["padding"], products)
    assert packed.numel() == products * 5 * 30 * 32
    weights["weight"] = torch.zeros(1).expand(weights["weight"].shape)
    assert torch.equal(ops.snake_upsample1d(made.x, **weights, **made.options, packed=packed), made.actual())


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", TRANSPOSED.values(), ids=TRANSPOSED.keys())
@pytest.mark.parametrize("isa", suite.instruction_sets())
def test_forward(shape: dict[str, Any], isa: str) -> None:
    with suite.instruction_set(isa):
        check(case(**shape))
        check(channels_last(case(**shape)))
        check(case(**shape), torch.float64)


@pytest.mark.parametrize("cin, stride, steps", [(1536, 2, 80), (768, 8, 35), (384, 6, 90), (192, 5, 210), (96, 4, 530)])
def test_codec_shapes(cin: int, stride: int, steps: int) -> None:
    """At most twice plain PyTorch's error, as any exact op; here it is about PyTorch's (0.4 to 1.3 times)."""
    made = direct_case(cin, cin // 2, stride, steps=steps, batch=1)
    with torch.no_grad():
        baseline = made.call(made.ref)
    expected = made.expected(torch.float32)
    made.options["winograd"] = 4
    report = testing.assert_close_to_f64(made.actual(), expected, baseline)
    assert report.rms <= 1.5 * report.baseline_rms


@pytest.mark.parametrize("tap", range(8))
def test_a_wrong_tap_is_seen(tap: int) -> None:
    check_wrong_tap(case(16, 16), tap)


@pytest.mark.parametrize("steps", suite.EDGE_STEPS)
def test_edge_sizes(steps: int) -> None:
    check_edge_sizes(case, steps, (0, 0))


def test_strides_and_slices() -> None:
    suite.check_layouts(case(19))
    suite.check_layouts(case(32, 48))


def test_lengths() -> None:
    check_lengths(case)


def test_determinism() -> None:
    check_determinism(case, 50)


def test_packed_gives_the_same_bits_and_reads_the_shape_alone() -> None:
    check_packed(case(30, 20, 5), "transposed", 4)


@pytest.mark.parametrize("cut", [3, 36, 210])
def test_a_stretch_between_groups_has_the_bits_of_the_whole(cut: int) -> None:
    made = channels_last(case(32, 48, 4, steps=300, batch=1))
    whole, w = made.actual(), made.weights
    parts = []
    for begin, end in ((0, cut), (cut, 300)):  # frames; the input begins with the frame before
        first = max(0, begin - 1)
        x = made.x[:, :, first : end + 1]
        steps = min(whole.shape[2], end * 4) - begin * 4
        out = torch.empty(1, steps, 48).transpose(1, 2)
        arguments = (x, w["alpha"], w["weight"], w["bias"], 4, "transposed", [2, 2], None, None, 4)
        torch.ops.dualcodec_ext.snake_upsample1d.out(*arguments, first=(begin - first) * 4, out=out)
        parts.append(out)
    assert torch.equal(torch.cat(parts, 2), whole)


def test_nan_reaches_every_sample_that_it_should() -> None:
    made = case(steps=30)
    made.x[1, 2, 16] = torch.nan
    y = made.actual()
    assert y[1][:, 62:70].isnan().all() and not y[0].isnan().any()
    assert not y[1][:, :60].isnan().any() and not y[1][:, 72:].isnan().any()


@pytest.mark.parametrize(
    "change, text",
    [
        ({"winograd": 3}, r"winograd must be 0 \(direct\) or 4 where mode is 'transposed', got 3"),
        ({"winograd": 4.0}, "winograd must be an integer, got 4.0"),
        ({"packed": torch.zeros(640)}, "packed must be a contiguous Float tensor of 1536 elements"),
        ({"x": torch.zeros(2, 6, 20).bfloat16()}, "winograd must be 0 unless x is float32 or float64"),
    ],
    ids=lambda v: "" if isinstance(v, str) else "".join(v),
)
def test_errors(change: dict[str, Any], text: str) -> None:
    made = case()
    with pytest.raises(ValueError, match="snake_upsample1d: " + text) as raised:
        ops.snake_upsample1d(**{"x": made.x, **made.weights, **made.options, **change})
    assert "\n" not in str(raised.value)


def test_errors_of_mode_and_stretch() -> None:
    weight, x, alpha = torch.zeros(5, 6, 8), torch.zeros(1, 6, 20), torch.ones(6)
    text = r"winograd must be 0 \(direct\) or 2 where mode is 'repeat', got 4"
    with pytest.raises(ValueError, match="pack_upsample1d: " + text):
        packing.pack_upsample1d(weight, 4, "repeat", (7, 0), 4)
    with pytest.raises(ValueError, match="snake_upsample1d: " + text):
        ops.snake_upsample1d(x, alpha, weight, stride=4, mode="repeat", padding=(7, 0), winograd=4)
    arguments = (x, alpha, torch.zeros(6, 5, 8), None, 4, "transposed", [2, 2], None, None, 4)
    with pytest.raises(
        ValueError, match="snake_upsample1d: first must be a multiple of stride = 4 with winograd = 4, got 2"
    ):
        torch.ops.dualcodec_ext.snake_upsample1d.out(*arguments, first=2, out=torch.empty(1, 5, 8))


def test_gradient_is_the_direct_one() -> None:
    found = []
    for winograd in (0, 4):
        made = case(3, 4, 3, steps=7)
        x = made.x.requires_grad_()
        ops.snake_upsample1d(x, **made.weights, **{**made.options, "winograd": winograd}).square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_opcheck() -> None:
    made = case()
    w = [None if t is None else t.detach() for t in made.weights.values()]
    suite.check_opcheck("snake_upsample1d", made.x, *w, 4, "transposed", [2, 2], torch.tensor([20, 9]), None, 4)
    suite.check_opcheck("pack_upsample1d", w[1], 4, "transposed", [2, 2], 4)


def test_compiles() -> None:
    suite.check_compiles(case())
    suite.check_compiles_dynamic(case())
