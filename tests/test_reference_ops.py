"""The reference functions: against the modules, against sums written out, and their edges."""

import math

import pytest
import torch
import torch.nn.functional as F

from dualcodec_ext import reference as R
from dualcodec_ext.reference import ops as ref_ops
from dualcodec_ext.testing import assert_close, poison_past_lengths, seed_model

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64


def rand(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=F64).to(dtype)


def alphas(channels):
    return 1 + 0.3 * rand(channels).sin()


# Each op as a function of x [B, 4, T] alone.
OPS = {
    "dwconv causal": lambda x, n=None: R.causal_dwconv1d_ref(x, rand(4, 7), rand(4), lengths=n),
    "dwconv centred with norm": lambda x, n=None: R.causal_dwconv1d_ref(
        x, rand(4, 5), None, (2, 2), 1 + 0.1 * rand(4), rand(4), lengths=n
    ),
    "conv strided": lambda x, n=None: R.snake_conv1d_ref(
        x, rand(6, 4, 6), rand(6), alphas(4), stride=3, padding=(2, 2), lengths=n
    ),
    "conv dilated tanh": lambda x, n=None: R.snake_conv1d_ref(
        x, rand(3, 4, 3), rand(3), dilation=2, padding=(1, 0), activation="tanh", lengths=n
    ),
    "upsample transposed": lambda x, n=None: R.snake_upsample1d_ref(
        x, alphas(4), rand(4, 3, 10), rand(3), 5, padding=(3, 3), lengths=n
    ),
    "upsample repeat": lambda x, n=None: R.snake_upsample1d_ref(
        x, alphas(4), rand(3, 4, 6), rand(3), 3, "repeat", (2, 3), lengths=n
    ),
    "residual unit": lambda x, n=None: R.residual_unit_ref(
        x, alphas(4), rand(4, 4, 7), rand(4), alphas(4), rand(4, 4, 1), rand(4), 3, lengths=n
    ),
    "residual unit, context in the input": lambda x, n=None: R.residual_unit_ref(
        x, alphas(4), rand(4, 4, 7), None, alphas(4), rand(4, 4, 1), None, 1, (0, 2), True, lengths=n
    ),
}
OUT_LENGTH = {
    "dwconv causal": lambda t: t,
    "dwconv centred with norm": lambda t: t,
    "conv strided": lambda t: (t - 2) // 3 + 1,
    "conv dilated tanh": lambda t: t - 3,
    "upsample transposed": lambda t: 5 * t - 1,
    "upsample repeat": lambda t: 3 * t,
    "residual unit": lambda t: t,
    "residual unit, context in the input": lambda t: t - 4,
}


@pytest.mark.parametrize("name", OPS)
def test_lengths_and_edges(name):
    op, x = OPS[name], rand(5, 4, 20)
    for t in (0, 1, 2, 6, 7, 20):
        assert op(x[..., :t]).shape[-1] == (max(0, OUT_LENGTH[name](t)) if t else 0)
        assert op(x[:0, :, :t]).shape[0] == 0
    lengths = torch.tensor([20, 7, 2, 1, 0])
    y = op(poison_past_lengths(x, lengths), lengths)
    assert y.shape == op(x).shape
    for i, n in enumerate(lengths.tolist()):
        alone = op(x[i : i + 1, :, :n])
        assert_close(y[i : i + 1, :, : alone.shape[-1]], alone, 1e-13)
        assert not y[i, :, alone.shape[-1] :].any()


@pytest.mark.parametrize("name", OPS)
def test_gradients(name):
    op = OPS[name]
    x = rand(2, 4, 9).requires_grad_()
    assert torch.autograd.gradcheck(op, (x,))
    empty = rand(2, 4, 0).requires_grad_()
    op(empty).sum().backward()  # an empty output is still part of the graph
    assert empty.grad.shape == (2, 4, 0)


def test_snake_conv1d_written_out():
    x, w, b, alpha, res = rand(1, 2, 8), rand(3, 2, 3), rand(3), alphas(2), rand(1, 3, 5)
    y = R.snake_conv1d_ref(x, w, b, alpha, 2, 2, (4, 2), "gelu", res)
    s = x[0] + torch.sin(alpha[:, None] * x[0]) ** 2 / (alpha[:, None] + 1e-9)
    for o in range(3):
        for t in range(5):
            total = b[o].clone()
            for c in range(2):
                for k in range(3):
                    at = 2 * t + 2 * k - 4
                    total += w[o, c, k] * (s[c, at] if 0 <= at < 8 else 0)
            expected = 0.5 * total * (1 + math.erf(total / math.sqrt(2))) + res[0, o, t]
            assert float(y[0, o, t]) == pytest.approx(float(expected), abs=1e-12)
    with pytest.raises(ValueError, match="activation must be 'none', 'tanh' or 'gelu', got 'relu'"):
        R.snake_conv1d_ref(x, w, activation="relu")
    with pytest.raises(ValueError, match="mode must be 'transposed' or 'repeat', got 'linear'"):
        R.snake_upsample1d_ref(x, alpha, w, mode="linear")


def test_ops_are_what_the_modules_do():
    decoder = R.Decoder(5, 8, [3, 2]).double()
    seed_model(decoder)
    block = decoder.model[1]
    x = rand(2, 8, 6)
    up = block.block[1]
    y = R.snake_upsample1d_ref(
        x, block.block[0].alpha.reshape(-1), up.folded_weight(), up.bias, up.stride, padding=up.padding
    )
    assert_close(y, up(block.block[0](x)), 1e-12)
    for causal in (False, True):
        unit = R.ResidualUnit(4, 9, causal=causal).double()
        seed_model(unit)
        convs = [m.conv if causal else m for m in (unit.block[1], unit.block[3])]
        tensors = []
        for snake, conv in zip((unit.block[0], unit.block[2]), convs, strict=True):
            tensors += [snake.alpha, conv.folded_weight(), conv.bias]
        assert_close(R.residual_unit_ref(y, *tensors, dilation=9, causal=causal), unit(y), 1e-12)
    for look_ahead in (False, True):
        up = R.CausalUpsample(8, 4, 5, look_ahead).double()
        y = R.snake_upsample1d_ref(
            x, block.block[0].alpha, up.folded_weight(), next(iter(up.parameters())), 5, "repeat", up.padding
        )
        assert_close(y, up(block.block[0](x)), 1e-12)
        assert y.shape[-1] == 30


def test_residual_unit_takes_context_rows():
    tensors = (alphas(4), rand(4, 4, 7), rand(4), alphas(4), rand(4, 4, 1), rand(4))
    x = rand(1, 4, 40)
    for causal in (True, False):
        whole = R.residual_unit_ref(x, *tensors, dilation=2, causal=causal)
        # 12 rows of context stand where the zeros of the padding would be.
        part = R.residual_unit_ref(x[..., 8:30], *tensors, dilation=2, padding=(0, 0), causal=causal)
        start = 20 if causal else 14
        assert_close(part, whole[..., start : start + 10], 1e-13)


RVQ = {
    "in_weight": (3, 4, 10),
    "in_bias": (3, 4),
    "codebooks": (3, 9, 4),
    "out_weight": (3, 10, 4),
    "out_bias": (3, 10),
}


def rvq_inputs(dtype=F64):
    return {name: rand(*shape, dtype=dtype) for name, shape in RVQ.items()}


def test_rvq_search_written_out():
    z, t = rand(2, 10, 5), rvq_inputs()
    codes, quantized, margin = R.rvq_search_ref(z, **t, return_quantized=True, return_margin=True)
    for b in range(2):
        for f in range(5):
            r = z[b, :, f].clone()
            for q in range(3):
                e = t["in_weight"][q] @ r + t["in_bias"][q]
                rows = t["codebooks"][q] / t["codebooks"][q].norm(dim=1, keepdim=True)
                d = (e / e.norm() - rows).square().sum(1)
                two = d.sort().values
                assert codes[b, q, f] == d.argmin()
                assert float(margin[b, q, f]) == pytest.approx(float(two[1] - two[0]), abs=1e-12)
                r -= t["out_weight"][q] @ t["codebooks"][q][codes[b, q, f]] + t["out_bias"][q]
            assert_close(quantized[b, :, f], z[b, :, f] - r, 1e-12)
    assert_close(R.rvq_lookup_ref(codes, t["codebooks"], t["out_weight"], t["out_bias"]), quantized, 1e-12)
    one = R.rvq_search_ref(z, **t, num_quantizers=1)
    assert torch.equal(one[0], codes[:, :1]) and one[1] is None and one[2] is None
    for wrong in (0, 4):
        with pytest.raises(ValueError, match=rf"num_quantizers must be in \[1, 3\], got {wrong}"):
            R.rvq_search_ref(z, **t, num_quantizers=wrong)


def test_rvq_search_ties_zeros_and_nan():
    t = rvq_inputs()
    t["codebooks"][0, 2] = t["codebooks"][0, 7]  # twins
    t["in_bias"].zero_()
    twin = torch.linalg.lstsq(t["in_weight"][0], t["codebooks"][0, 7:8].T).solution  # [10, 1]
    z = torch.stack([twin[:, 0], torch.zeros(10, dtype=F64), torch.full((10,), math.nan, dtype=F64)], 1)[None]
    codes, quantized, margin = R.rvq_search_ref(z, **t, return_quantized=True, return_margin=True)
    assert codes[0, 0, 0] == 2 and margin[0, 0, 0] == 0
    squares = F.normalize(t["codebooks"][0]).square().sum(1)
    assert codes[0, 0, 1] == squares.argmin()
    t["codebooks"][0, 4] = t["codebooks"][0, 6] = 0  # rows of zeros: their square, 0, is the smallest
    assert R.rvq_search_ref(z, **t)[0][0, 0, 1] == 4
    assert not codes[0, :, 2].any() and quantized[0, :, 2].isnan().all() and margin[0, :, 2].isnan().all()
    assert not quantized[..., :2].isnan().any()
    single = {name: v[:, :1] if name == "codebooks" else v for name, v in t.items()}
    margin = R.rvq_search_ref(z[..., :2], **single, return_margin=True)[2]
    assert margin.isinf().all()


def test_rvq_search_runs_in_float32_in_every_mode():
    z, t = rand(1, 10, 30, dtype=torch.bfloat16), rvq_inputs(torch.float32)
    expected = R.rvq_search_ref(z.float(), **t, return_quantized=True)
    codes, quantized, _ = R.rvq_search_ref(z, **t, return_quantized=True)
    assert torch.equal(codes, expected[0]) and torch.equal(quantized, expected[1].bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(R.rvq_search_ref(z.float(), **t)[0], expected[0])


def test_rvq_lengths_empties_and_gradient():
    z, t = rand(3, 10, 6), rvq_inputs()
    lengths = torch.tensor([6, 2, 0])
    poisoned = poison_past_lengths(z, lengths)
    codes, quantized, margin = R.rvq_search_ref(
        poisoned, **t, return_quantized=True, return_margin=True, lengths=lengths
    )
    book = (t["codebooks"], t["out_weight"], t["out_bias"])
    for i, n in enumerate(lengths.tolist()):
        alone = R.rvq_search_ref(z[i : i + 1, :, :n], **t, return_quantized=True, return_margin=True)
        for whole, part in zip((codes, quantized, margin), alone, strict=True):
            assert_close(whole[i : i + 1, :, :n], part, 1e-13)
            assert not whole[i, :, n:].any()
    codes = torch.where(ref_ops.mask_past_lengths(torch.ones_like(codes), lengths) > 0, codes, 999)
    addend = rand(3, 10, 6)
    y = R.rvq_lookup_ref(codes, *book, addend=addend, lengths=lengths)
    assert_close(y, ref_ops.mask_past_lengths(quantized + addend, lengths), 1e-12)
    with pytest.raises(ValueError, match=r"in \[0, 9\), got 999 at batch 1, stage 0, frame 2"):
        R.rvq_lookup_ref(codes, *book)
    with pytest.raises(ValueError, match="at most 3 stages, got 4"):
        R.rvq_lookup_ref(torch.zeros(1, 4, 2).long(), *book)
    assert R.rvq_search_ref(z[..., :0], **t, return_margin=True)[2].shape == (3, 3, 0)
    assert R.rvq_search_ref(z[:0], **t, return_quantized=True)[1].shape == (0, 10, 6)
    assert R.rvq_lookup_ref(codes[..., :0], *book).shape == (3, 10, 0)
    # Straight through: the choice counts as the identity, so one stage has the gradient out_weight in_weight.
    z.requires_grad_()
    R.rvq_search_ref(z, **t, num_quantizers=1, return_quantized=True)[1].sum().backward()
    expected = (t["out_weight"][0] @ t["in_weight"][0]).sum(0)[None, :, None].expand_as(z)
    assert_close(z.grad, expected, 1e-12)
    rows = t["codebooks"].clone().requires_grad_()
    R.rvq_lookup_ref(codes[:1], rows, *book[1:]).sum().backward()
    assert rows.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["conv strided", "upsample transposed", "upsample repeat", "residual unit"])
def test_low_precision_runs(monkeypatch, name, dtype):
    x = rand(1, 4, 12)
    expected = OPS[name](x)
    exact = rand
    monkeypatch.setitem(globals(), "rand", lambda *shape: exact(*shape, dtype=dtype))  # the op's own tensors too
    y = OPS[name](x.to(dtype))
    assert y.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    assert_close(y.double(), expected, tolerance * float(expected.abs().max()))
