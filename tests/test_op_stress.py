"""Drawn shapes, strides and slices of every op, against the references in float64."""

from __future__ import annotations

from typing import Any

import opsuite as suite
import test_causal_dwconv1d as dwconv
import test_residual_unit as unit
import test_rvq_lookup as lookup
import test_rvq_search as search
import test_snake_conv1d as conv
import test_snake_upsample1d as upsample
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualcodec_ext import ops, testing

# No deadline: a shared machine may take any time over one example, and a timing decides nothing.
drawn = settings(max_examples=25, deadline=None, derandomize=True)
channels = st.integers(1, 40)
steps = st.integers(0, 60)
batch = st.integers(0, 3)
seeds = st.integers(0, 2**16)
layouts = st.sampled_from(["contiguous", "channels_last", "time_slice", "every_second", "channel_slice", "time_first"])


def run(case: suite.Case, layout: str, data: Any) -> None:
    case.x = testing.strided_copies(case.x)[layout]
    if data.draw(st.booleans(), "with lengths"):
        most = case.x.shape[-1]
        lengths = data.draw(st.lists(st.integers(0, most), min_size=len(case.x), max_size=len(case.x)))
        case.lengths = torch.tensor(lengths, dtype=torch.int64)
    suite.check(case)


@drawn
@given(
    channels,
    channels,
    st.integers(1, 9),
    steps,
    batch,
    st.integers(1, 5),
    st.integers(1, 4),
    seeds,
    layouts,
    st.data(),
)
def test_snake_conv1d(
    cin: int,
    cout: int,
    taps: int,
    n: int,
    b: int,
    stride: int,
    dilation: int,
    seed: int,
    layout: str,
    data: Any,
) -> None:
    padding = (data.draw(st.integers(0, 12)), data.draw(st.integers(0, 12)))
    activation = data.draw(st.sampled_from(["none", "tanh", "gelu"]))
    made = conv.case(
        cin,
        cout,
        taps,
        n,
        b,
        seed=seed,
        stride=stride,
        dilation=dilation,
        padding=padding,
        activation=activation,
    )
    run(made, layout, data)


@drawn
@given(channels, steps, batch, st.integers(1, 9), st.booleans(), seeds, layouts, st.data())
def test_residual_unit(c: int, n: int, b: int, dilation: int, causal: bool, seed: int, layout: str, data: Any) -> None:
    padding = data.draw(st.none() | st.tuples(st.integers(0, 60), st.integers(0, 60)))
    run(unit.case(c, n, b, seed=seed, dilation=dilation, causal=causal, padding=padding), layout, data)


@drawn
@given(
    channels,
    channels,
    st.integers(1, 8),
    st.sampled_from(["transposed", "repeat"]),
    steps,
    batch,
    seeds,
    layouts,
    st.data(),
)
def test_snake_upsample1d(
    cin: int, cout: int, stride: int, mode: str, n: int, b: int, seed: int, layout: str, data: Any
) -> None:
    padding = (data.draw(st.integers(0, 3 * stride)), data.draw(st.integers(0, 3 * stride)))
    run(upsample.case(cin, cout, stride, mode, n, b, padding=padding, seed=seed), layout, data)


@drawn
@given(channels, st.integers(1, 64), steps, batch, st.booleans(), seeds, layouts, st.data())
def test_causal_dwconv1d(c: int, taps: int, n: int, b: int, norm: bool, seed: int, layout: str, data: Any) -> None:
    # LayerNorm over one or two channels divides by almost nothing: rounding there is not of order one.
    norm = norm and c > 4
    padding = data.draw(st.none() | st.tuples(st.integers(0, 70), st.integers(0, 70)))
    run(dwconv.case(c, taps, n, b, norm=norm, seed=seed, padding=padding), layout, data)


@drawn
@given(
    channels,
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(1, 90),
    st.integers(2, 20),
    st.integers(1, 3),
    seeds,
)
def test_rvq_search(c: int, n: int, stages: int, entries: int, dim: int, b: int, seed: int) -> None:
    search.check(search.make(c, n, stages, entries, dim, b, seed))


@drawn
@given(channels, steps, st.integers(1, 5), st.integers(1, 90), st.integers(1, 64), batch, seeds, st.data())
def test_rvq_lookup(c: int, n: int, stages: int, entries: int, dim: int, b: int, seed: int, data: Any) -> None:
    codes, weights, addend = lookup.make(c, n, stages, entries, dim, b, seed)
    used = data.draw(st.integers(1, stages))
    lookup.check(codes[:, :used], weights, addend)
    torch.testing.assert_close(
        ops.rvq_lookup(codes[:, :used], **weights, channels_last=True),
        ops.rvq_lookup(codes[:, :used], **weights),
    )
