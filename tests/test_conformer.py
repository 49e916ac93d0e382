"""A Conformer layer's parts, against the plain torch of `_w2v_layers` in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from tolerances import BF16, F32, F64, TOLERANCE
from torch import Tensor
from torch.nn import functional as F

from dualcodec_ext import _w2v_layers as layers
from dualcodec_ext import build, testing

DTYPES = (F32, BF16)
CONFORMER = torch.ops.dualcodec_ext
EPS = 1e-5


@pytest.fixture(autouse=True)
def module() -> None:
    assert build.load_module() is not None


@pytest.fixture(params=["generic", "avx2", "avx512", "avx512_bf16", "amx_bf16"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    module = build.load_module()
    assert module is not None
    before = module.active_isa()
    if not module.set_isa(request.param):
        pytest.skip(f"{request.param} can't run here")
    yield request.param
    module.set_isa(before)


def made(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some_valid(batch: int, steps: int) -> Tensor:
    """The last clip has no valid step, the one before it a third."""
    valid = torch.ones(batch, steps, dtype=torch.bool)
    valid[-1] = False
    if batch > 1:
        valid[-2, steps // 3 :] = False
    return valid


def compare(actual: Tensor, expected: Tensor, name: str, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    testing.assert_close(actual, expected, TOLERANCE[name, dtype])


# [B, T, heads, D, left, right]: w2v-BERT's own, then edges: one step, odd sizes, distances that reach past the clip.
ATTENTION = [
    (1, 499, 16, 64, 64, 8),
    (2, 1, 2, 16, 64, 8),
    (3, 37, 3, 12, 5, 0),
    (2, 140, 2, 17, 0, 3),
    (1, 16, 1, 64, 64, 8),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("batch", "steps", "heads", "size", "left", "right"), ATTENTION)
def test_attention(
    isa: str, batch: int, steps: int, heads: int, size: int, left: int, right: int, masked: bool, dtype: torch.dtype
) -> None:
    projected = made(batch, steps, 3 * heads * size, dtype=dtype)
    distances = made(left + 1 + right, size, dtype=dtype, seed=1)
    valid = some_valid(batch, steps) if masked else None
    expected = layers._attend(projected.double(), distances.double(), heads, left, valid)
    with testing.poisoned_memory():
        actual = CONFORMER.conformer_attention(projected, distances, heads, left, valid)
    compare(actual, expected, "conformer_attention", dtype)


def test_attention_of_large_and_small_scores() -> None:
    """Scores past what float32's exp takes, and one key that outweighs all others."""
    projected = made(1, 50, 3 * 32) * torch.tensor([60.0] * 64 + [1.0] * 32)
    distances = made(10, 32, seed=1)
    actual = CONFORMER.conformer_attention(projected, distances, 1, 4, None)
    expected = layers._attend(projected.double(), distances.double(), 1, 4, None)
    assert float((expected - projected[..., 64:].double()).abs().min()) < 1e-6
    testing.assert_close(actual, expected, 2e-3)  # scores of thousands carry float32's rounding


def test_attention_keeps_a_nan_where_it_is_heard() -> None:
    projected = made(1, 40, 2 * 3 * 16)
    projected[0, 7, 16] = torch.nan  # a query of the second head
    distances = made(5, 16, seed=1)
    y = CONFORMER.conformer_attention(projected, distances, 2, 2, None)[0]
    assert y[7, 16:].isnan().all() and int(y.isnan().sum()) == 16
    projected = made(1, 40, 2 * 3 * 16)
    projected[0, 9, 32] = torch.nan  # a key of the first head
    y = CONFORMER.conformer_attention(projected, distances, 2, 2, None)[0]
    assert y[:, :16].isnan().all() and y[:, 16:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("batch", "steps", "channels", "taps"), [(1, 499, 1024, 31), (2, 1, 64, 31), (3, 37, 36, 5), (2, 130, 100, 1)]
)
def test_convolution(
    isa: str, batch: int, steps: int, channels: int, taps: int, masked: bool, dtype: torch.dtype
) -> None:
    x = made(batch, steps, 2 * channels, dtype=dtype) * 2
    weight = made(taps, channels, seed=1) * taps**-0.5
    norm = 1 + 0.1 * made(channels, seed=2), 0.1 * made(channels, seed=3)
    valid = some_valid(batch, steps) if masked else None
    expected = layers._convolve(x.double(), weight.double(), norm[0].double(), norm[1].double(), EPS, valid)
    with testing.poisoned_memory():
        actual = CONFORMER.conformer_convolution(x, weight, *norm, EPS, valid)
    compare(actual, expected, "conformer_convolution", dtype)


def packed_linear(inner: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A weight [N, K], the same packed, and a bias."""
    weight = (made(columns, inner, seed=1) * inner**-0.5).to(dtype)
    return weight, CONFORMER.pack_conv1d(weight[..., None]), made(columns, seed=2)


LINEAR = [(1, 499, 1024, 240), (1, 100, 4096, 112), (2, 1, 2, 16), (3, 37, 30, 48), (1, 300, 160, 1024)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("swish", [False, True])
@pytest.mark.parametrize(("batch", "steps", "inner", "columns"), LINEAR)
def test_linear(isa: str, batch: int, steps: int, inner: int, columns: int, swish: bool, dtype: torch.dtype) -> None:
    x = made(batch, steps, inner, dtype=dtype)
    weight, packed, bias = packed_linear(inner, columns, dtype)
    expected = F.linear(x.double(), weight.double(), bias.double())
    with testing.poisoned_memory():
        actual = CONFORMER.conformer_linear(x, packed, bias, columns, swish)
    compare(actual, F.silu(expected) if swish else expected, "conformer_linear", dtype)
    with testing.poisoned_memory():
        actual = CONFORMER.conformer_linear(x, packed, None, columns, swish)
    expected = expected - bias.double()
    compare(actual, F.silu(expected) if swish else expected, "conformer_linear", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "steps", "inner", "columns"), LINEAR)
def test_linear_added_to_a_sum(isa: str, batch: int, steps: int, inner: int, columns: int, dtype: torch.dtype) -> None:
    x, total = made(batch, steps, inner, dtype=dtype), made(batch, steps, columns, seed=3)
    weight, packed, bias = packed_linear(inner, columns, dtype)
    expected = total.double() + 0.5 * F.linear(x.double(), weight.double(), bias.double())
    CONFORMER.conformer_linear_add(total, x, packed, bias, 0.5)
    compare(total, expected, "conformer_linear", F32)  # the sum stays float32, whatever x is


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_is_as_accurate_as_torch(dtype: torch.dtype) -> None:
    """By the rule for 100,000 outputs and more, at the model's widest reduction."""
    x = made(1, 128, 4096, dtype=dtype)
    weight, packed, bias = packed_linear(4096, 1024, dtype)
    expected = F.linear(x.double(), weight.double(), bias.double())
    actual = CONFORMER.conformer_linear(x, packed, bias, 1024, False)
    testing.assert_close_to_f64(actual, expected, F.linear(x, weight, bias.to(dtype)))


def test_linear_keeps_a_nan_in_its_row() -> None:
    x = made(1, 40, 32)
    x[0, 7, 3] = torch.nan
    _, packed, bias = packed_linear(32, 64, F32)
    y = CONFORMER.conformer_linear(x, packed, bias, 64, True)[0]
    assert y[7].isnan().all() and int(y.isnan().sum()) == 64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("addend", [None, *DTYPES])
@pytest.mark.parametrize("following", [False, True])
@pytest.mark.parametrize("shape", [(1, 499, 1024), (2, 33, 36), (3, 1, 1)])
def test_norm(
    isa: str, shape: tuple[int, ...], following: bool, addend: torch.dtype | None, dtype: torch.dtype
) -> None:
    x, channels = made(*shape) * 3, shape[-1]
    added = None if addend is None else made(*shape, dtype=addend, seed=1)
    first, second = ((1 + 0.1 * made(channels, seed=s), 0.1 * made(channels, seed=s + 1)) for s in (2, 4))
    total = x.double() if added is None else x.double() + 0.5 * added.double()
    expected = F.layer_norm(total, (channels,), *(v.double() for v in first), EPS)
    if following:
        total, expected = expected, F.layer_norm(expected, (channels,), *(v.double() for v in second), EPS)
    more = second if following else (None, None)
    actual = CONFORMER.conformer_norm(x, added, 0.5, *first, EPS, dtype, *more)
    compare(actual, expected, "conformer_norm", dtype)
    compare(x, total, "conformer_norm", F32)


def each_op(batch: int, steps: int, dtype: torch.dtype) -> dict[str, Callable[[slice], Tensor]]:
    """The ops on some of the clips."""
    projected, x = made(batch, steps, 3 * 96, dtype=dtype), made(batch, steps, 192, dtype=dtype)
    distances, weight, row = made(12, 48, dtype=dtype), made(7, 96), made(batch, steps, 96)
    norm, valid = (made(96, seed=1), made(96, seed=2)), some_valid(batch, steps)
    _, packed, bias = packed_linear(192, 96, dtype)

    def added(of: slice) -> Tensor:
        total = row[of].clone()
        CONFORMER.conformer_linear_add(total, x[of], packed, bias, 0.5)
        return total

    return {
        "linear": lambda of: CONFORMER.conformer_linear(x[of], packed, bias, 96, True),
        "linear_add": added,
        "attention": lambda of: CONFORMER.conformer_attention(projected[of], distances, 2, 8, valid[of]),
        "convolution": lambda of: CONFORMER.conformer_convolution(x[of], weight, *norm, EPS, valid[of]),
        "norm": lambda of: CONFORMER.conformer_norm(row[of].clone(), x[of, :, :96], 0.5, *norm, EPS, dtype),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["attention", "convolution", "linear", "linear_add", "norm"])
def test_bits_depend_on_no_thread_and_no_neighbour(op: str, dtype: torch.dtype) -> None:
    call = each_op(8, 301, dtype)[op]
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(call(slice(None)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    for clip in range(8):
        assert torch.equal(call(slice(clip, clip + 1)), found[0][clip : clip + 1])


@pytest.mark.parametrize("op", ["attention", "convolution", "linear", "linear_add", "norm"])
def test_nothing_is_computed_of_nothing(op: str) -> None:
    for batch, steps in ((0, 5), (2, 0)):
        assert each_op(max(batch, 1), steps, F32)[op](slice(batch)).shape == (batch, steps, 96)


def test_any_strides() -> None:
    projected, distances = made(2, 30, 3 * 32), made(9, 16)
    expected = CONFORMER.conformer_attention(projected, distances, 2, 4, None)
    for view in testing.strided_copies(projected.transpose(1, 2)).values():
        assert torch.equal(CONFORMER.conformer_attention(view.transpose(1, 2), distances, 2, 4, None), expected)
    x, weight, norm = made(2, 30, 64), made(5, 32), (made(32), made(32))
    expected = CONFORMER.conformer_convolution(x, weight, *norm, EPS, None)
    for view in testing.strided_copies(x.transpose(1, 2)).values():
        assert torch.equal(CONFORMER.conformer_convolution(view.transpose(1, 2), weight, *norm, EPS, None), expected)


def test_a_wrong_call_is_one_line() -> None:
    x, row, vector = made(1, 4, 24), made(1, 4, 8), made(8)
    attention, convolution, norm, linear, add = (
        getattr(CONFORMER, f"conformer_{name}") for name in ("attention", "convolution", "norm", "linear", "linear_add")
    )

    def fails(match: str, call: Callable[..., Tensor], *args: object) -> None:
        with pytest.raises(ValueError, match=match):
            call(*args)

    def attend(x: Tensor, distances: Tensor, heads: int, left: int, valid: Tensor | None = None) -> Tensor:
        return attention(x, distances, heads, left, valid)

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return convolution(x, weight, vector, vector, EPS, None)

    def normed(x: Tensor, addend: Tensor | None, dtype: torch.dtype, *more: Tensor) -> Tensor:
        return norm(x, addend, 1.0, vector, vector, EPS, dtype, *more)

    three = made(3, 8)
    fails(r"^conformer_attention: projected must be \[B, T, C\], got \[4, 24\]", attend, x[0], three, 1, 1)
    fails(r"projected must be float32 or bfloat16, got Double", attend, x.double(), three, 1, 1)
    fails(r"must have 3 \* D channels for each of 5 heads, got \[1, 4, 24\]", attend, x, three, 5, 1)
    fails(r"distances must be \[more than 3, D\] = \[.., 8\] Float, got \[3, 8\]", attend, x, three, 1, 3)
    short = torch.ones(1, 3, dtype=torch.bool)
    fails(r"valid must be \[B, T\] = \[1, 4\] bool, got \[1, 3\]", attend, x, three, 1, 1, short)
    fails(r"^conformer_convolution: x must have 2 \* C channels, got \[1, 4, 3\]", convolve, x[..., :3], three)
    fails(r"weight must be \[K, C\] = \[K, 12\] float32, got \[3, 8\]", convolve, x, three)
    fails(r"ln_weight must be \[C\] = \[12\] float32, got \[8\]", convolve, x, made(3, 12))
    fails(r"^conformer_norm: x must be contiguous float32", normed, row.bfloat16(), None, F32)
    fails(r"dtype must be float32 or bfloat16, got Double", normed, row, None, F64)
    fails(r"addend must be x's shape \[1, 4, 8\], got \[1, 4, 24\]", normed, row, x, F32)
    fails(r"next_weight and next_bias must come together", normed, row, None, F32, vector)
    packed = packed_linear(24, 16, F32)[1]
    fails(r"^conformer_linear: x must be float32 or bfloat16, got Double", linear, x.double(), packed, None, 16, False)
    fails(r"x must be contiguous with an even number of channels", linear, x[..., :3], packed, None, 16, False)
    fails(r"columns must be a multiple of 16, got 8", linear, x, packed, None, 8, False)
    fails(r"packed must be pack_conv1d's of \[N, K, 1\] = \[32, 24, 1\] Float", linear, x, packed, None, 32, False)
    fails(r"packed must be .* BFloat16, got \[384\] Float", linear, x.bfloat16(), packed, None, 16, False)
    fails(r"bias must be \[C\] = \[16\] float32, got \[8\]", linear, x, packed, vector, 16, False)
    fails(r"^conformer_linear_add: sum must be \[B, T, N\] float32", add, row.bfloat16(), x, packed, None, 1.0)
    fails(r"with x's B and T, got \[1, 3, 16\] Float for x \[1, 4, 24\]", add, made(1, 3, 16), x, packed, None, 1.0)
