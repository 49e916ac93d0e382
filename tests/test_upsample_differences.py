"""snake_upsample1d's form of the repeat mode by differences of frames: 2 products of a phase for up to 3."""

from __future__ import annotations

from typing import Any

import opsuite as suite
import pytest
import test_upsample_winograd as form
import torch
from test_snake_upsample1d import case as direct_case
from test_upsample_winograd import channels_last, check

from dualcodec_ext import ops, testing
from dualcodec_ext.reference.layers import CausalUpsample

REPEAT = {
    "causal": {},
    "causal, odd stride": {"stride": 5, "cin": 20, "cout": 33},
    "look-ahead": {"stride": 6, "padding": (3, 8)},
    "no padding": {"stride": 3, "padding": (0, 0)},
    "stride 1": {"stride": 1, "bias": False},
    "wide padding": {"stride": 2, "padding": (9, 7)},
    "more than a panel": {"cin": 96, "cout": 112, "stride": 3, "steps": 200},
    "whole registers": {"cin": 48, "cout": 32, "steps": 150},
}


def case(*sizes: Any, **options: Any) -> suite.Case:
    made = direct_case(*sizes, mode="repeat", **options)
    made.options["winograd"] = 2
    return made


@pytest.mark.parametrize("shape", REPEAT.values(), ids=REPEAT.keys())
@pytest.mark.parametrize("isa", suite.instruction_sets())
def test_forward(shape: dict[str, Any], isa: str) -> None:
    with suite.instruction_set(isa):
        check(case(**shape))
        check(channels_last(case(**shape)))
        check(case(**shape), torch.float64)


@pytest.mark.parametrize("cin, stride, steps", [(1536, 2, 80), (768, 8, 35), (384, 6, 90), (192, 5, 210), (96, 4, 530)])
@pytest.mark.parametrize("look_ahead", [False, True], ids=["causal", "look-ahead"])
def test_codec_shapes(cin: int, stride: int, steps: int, look_ahead: bool) -> None:
    """At most twice plain PyTorch's error, as any exact op."""
    padding = CausalUpsample(2, 2, stride, look_ahead=look_ahead).padding
    made = direct_case(cin, cin // 2, stride, mode="repeat", steps=steps, batch=1, padding=padding)
    with torch.no_grad():
        baseline = made.call(made.ref)
    expected = made.expected(torch.float32)
    made.options["winograd"] = 2
    testing.assert_close_to_f64(made.actual(), expected, baseline)


@pytest.mark.parametrize("tap", range(8))
def test_a_wrong_tap_is_seen(tap: int) -> None:
    form.check_wrong_tap(case(16, 16), tap)


@pytest.mark.parametrize("steps", suite.EDGE_STEPS)
def test_edge_sizes(steps: int) -> None:
    form.check_edge_sizes(case, steps, (1, 2))


def test_strides_and_slices() -> None:
    suite.check_layouts(case(19))
    suite.check_layouts(case(32, 48))


def test_lengths() -> None:
    form.check_lengths(case)


def test_determinism() -> None:
    form.check_determinism(case, 30)


def test_packed_reads_each_tap_once() -> None:
    form.check_packed(case(30, 20, 5), "repeat", 2)


@pytest.mark.parametrize("padding", [(7, 0), (2, 5)], ids=["causal", "look-ahead"])
@pytest.mark.parametrize("cut", [1, 6, 203, 402])
def test_a_stretch_has_the_bits_of_the_whole(cut: int, padding: tuple[int, int]) -> None:
    """Wherever it begins, in mid-frame too, and with no more frames than it needs."""
    made = channels_last(case(32, 48, 4, steps=150, batch=1, padding=padding))
    whole, w = made.actual(), made.weights
    total, parts = whole.shape[2], []
    for begin, end in ((0, cut), (cut, total)):
        first = max(0, (begin - padding[0]) // 4)
        stop = min(150, (end - 1 - padding[0] + 7) // 4 + 1)
        before = first - (begin - padding[0]) // 4  # frames of zeros that it begins with
        x = torch.nn.functional.pad(made.x[:, :, first:stop], (before, 0)).transpose(1, 2).contiguous().transpose(1, 2)
        out = torch.empty(1, end - begin, 48).transpose(1, 2)
        arguments = (x, w["alpha"], w["weight"], w["bias"], 4, "repeat", list(padding), None, None, 2)
        at = begin - (first - before) * 4
        torch.ops.dualcodec_ext.snake_upsample1d.out(*arguments, first=at, out=out)
        parts.append(out)
    assert torch.equal(torch.cat(parts, 2), whole)


@pytest.mark.parametrize("padding", [(7, 0), (2, 5)], ids=["causal", "look-ahead"])
def test_nan_reaches_every_sample_that_it_should(padding: tuple[int, int]) -> None:
    made = case(steps=30, padding=padding)
    made.x[1, 2, 16] = torch.nan
    direct = direct_case(mode="repeat", steps=30, padding=padding)
    direct.x = made.x
    nan, wanted = made.actual().isnan(), direct.actual().isnan()
    assert not (wanted & ~nan).any() and not nan[0].any()
    reached = nan[1].any(0).nonzero().flatten()
    expected = wanted[1].any(0).nonzero().flatten()
    assert expected[0] - reached[0] < 4 and reached[-1] - expected[-1] < 4  # no other frame's


@pytest.mark.parametrize(
    "change, text",
    [
        ({"winograd": 4}, r"winograd must be 0 \(direct\) or 2 where mode is 'repeat', got 4"),
        ({"packed": torch.zeros(640)}, "packed must be a contiguous Float tensor of 768 elements"),
        ({"x": torch.zeros(2, 6, 20).bfloat16()}, "winograd must be 0 unless x is float32 or float64"),
    ],
    ids=lambda v: "" if isinstance(v, str) else "".join(v),
)
def test_errors(change: dict[str, Any], text: str) -> None:
    made = case()
    with pytest.raises(ValueError, match="snake_upsample1d: " + text) as raised:
        ops.snake_upsample1d(**{"x": made.x, **made.weights, **made.options, **change})
    assert "\n" not in str(raised.value)


def test_opcheck() -> None:
    made = case()
    w = [None if t is None else t.detach() for t in made.weights.values()]
    suite.check_opcheck("snake_upsample1d", made.x, *w, 4, "repeat", [7, 0], torch.tensor([20, 9]), None, 2)
    suite.check_opcheck("pack_upsample1d", w[1], 4, "repeat", [7, 0], 2)


def test_compiles() -> None:
    suite.check_compiles(case())
