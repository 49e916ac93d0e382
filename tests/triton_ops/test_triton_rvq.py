"""rvq_search and rvq_lookup in Triton: the compiled ops' tests."""

from __future__ import annotations

from typing import Any

import opsuite as suite
import pytest
import test_rvq_lookup as compiled_lookup
import test_rvq_search as compiled
import torch
from test_rvq_search import Quantizer

from dualcodec_ext import ops, reference, testing
from dualcodec_ext.ops import packing

NAMESPACE = "dualcodec_ext_triton"
HALVES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def make(device: str) -> Any:
    def build(*args: Any, **options: Any) -> Quantizer:
        made = compiled.make(*args, **options)
        return Quantizer(made.z.to(device), {k: v.to(device) for k, v in made.weights.items()})

    return build


@pytest.fixture
def lookup(device: str) -> Any:
    """Codes, weights and an addend."""

    def build(*args: Any, **options: Any) -> Any:
        codes, weights, addend = compiled_lookup.make(*args, **options)
        return codes.to(device), {k: v.to(device) for k, v in weights.items()}, addend.to(device)

    return build


@pytest.mark.parametrize("shape", compiled.SHAPES.values(), ids=compiled.SHAPES.keys())
def test_forward(make: Any, shape: dict[str, Any]) -> None:
    report = compiled.check(make(**shape))
    assert report.excused <= report.total // 100


CODEC = {
    "12hz acoustic": {"channels": 1024, "stages": 2, "entries": 4096, "frames": 17, "batch": 1},
    "25hz acoustic": {"channels": 1024, "stages": 11, "entries": 1024, "frames": 3, "batch": 1},
    "semantic": {"channels": 768, "stages": 1, "entries": 16384, "frames": 5, "batch": 1},
    "65536 entries": {"channels": 64, "stages": 1, "entries": 65536, "dim": 2, "frames": 2, "batch": 1},
    "seventeen stages": {"channels": 40, "stages": 17, "entries": 40, "frames": 17, "batch": 1},
}


@pytest.mark.parametrize("shape", CODEC.values(), ids=CODEC.keys())
def test_codec_shapes(make: Any, shape: dict[str, Any]) -> None:
    report = compiled.check(make(**shape))
    assert report.excused <= max(1, report.total // 200)


def test_every_prefix_of_stages(make: Any) -> None:
    q = make(stages=4)
    whole, _, margins = q.search(return_margin=True)
    for n in range(1, 5):
        codes, _, margin = q.search(num_quantizers=n, return_quantized=True, return_margin=True)
        assert torch.equal(codes, whole[:, :n]) and torch.equal(margin, margins[:, :n])


def test_only_what_is_asked_for_comes(make: Any) -> None:
    q = make()
    codes, quantized, margin = q.search()
    assert quantized is None and margin is None
    for options in ({"return_quantized": True}, {"return_margin": True}):
        assert torch.equal(q.search(**options)[0], codes)


def test_gradient_is_refused(make: Any) -> None:
    q = make()
    quantized = q.search(q.z.clone().requires_grad_(), return_quantized=True)[1]
    with pytest.raises(RuntimeError, match="rvq_search: has no gradient"):
        quantized.sum().backward()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_dtypes(make: Any, dtype: torch.dtype) -> None:
    q = make(channels=40).to(dtype)
    codes, quantized, margin = q.search(return_quantized=True, return_margin=True)
    expected, total, margins = q.to(torch.float64).reference(return_quantized=True, return_margin=True)
    testing.compare_codes(codes, expected, margins, testing.rvq_margin_bound(q.z, **q.weights))
    assert quantized.dtype == dtype and margin.dtype == torch.float32
    same = (codes == expected).all(1, keepdim=True).expand(quantized.shape)
    limit = {torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert (quantized.double() - total).abs()[same].max() <= limit


def test_strides_and_slices(make: Any) -> None:
    q = make(channels=19)
    expected = q.search(return_quantized=True)
    for name, z in testing.strided_copies(q.z).items():
        codes, quantized, _ = q.search(z, return_quantized=True)
        assert torch.equal(codes, expected[0]) and torch.equal(quantized, expected[1]), name
        assert quantized.stride(1) == 1 if z.stride(1) == 1 else quantized.is_contiguous(), name


@pytest.mark.parametrize("frames", [0, 1, 16, 17])
def test_edge_sizes(make: Any, frames: int) -> None:
    compiled.check(make(frames=frames)) if frames else None
    for batch in (0, 2):
        codes, quantized, margin = make(frames=frames, batch=batch).search(return_quantized=True, return_margin=True)
        assert codes.shape == margin.shape == (batch, 3, frames) and quantized.shape == (batch, 20, frames)


@pytest.mark.parametrize("offset", [1, 16, 100, 128, 200])
def test_ties_take_the_lowest_index(make: Any, offset: int) -> None:
    """Every row stands twice, in another place of a block or in another block; the first of the two must win."""
    q = make(entries=offset, stages=2)
    once = q.search()[0]
    q.weights["codebooks"] = torch.cat([q.weights["codebooks"]] * 2, 1)
    codes, _, margin = q.search(return_margin=True)
    assert torch.equal(codes, once) and (margin == 0).all()


def test_a_zero_vector_takes_the_smallest_square(make: Any) -> None:
    q = make(stages=1, dim=4)
    q.weights["in_weight"].zero_()
    q.weights["in_bias"].zero_()
    q.weights["codebooks"][0, [11, 30]] = 0.0  # they normalise to zero, the others to one
    assert (q.search()[0] == 11).all()


def test_scale_does_not_matter(make: Any) -> None:
    q = make(stages=1)
    q.weights["in_bias"].zero_()
    codes = q.search()[0]
    for scale in (1e-6, 1e12, 1e25):
        assert torch.equal(Quantizer(q.z * scale, q.weights).search()[0], codes)
        rows = {**q.weights, "codebooks": q.weights["codebooks"] * scale}
        assert torch.equal(Quantizer(q.z, rows).search()[0], codes)


def test_nan_gives_code_0_and_a_nan_sum(make: Any) -> None:
    q = make()
    clean = q.search(return_quantized=True, return_margin=True)
    q.z[1, 4, 9] = torch.nan
    q.z[0, 3, 2] = torch.inf
    codes, quantized, margin = q.search(return_quantized=True, return_margin=True)
    for b, f in ((1, 9), (0, 2)):
        assert (codes[b, :, f] == 0).all() and quantized[b, :, f].isnan().all() and margin[b, :, f].isnan().all()
    others = torch.ones(2, 30, dtype=torch.bool)
    others[1, 9] = others[0, 2] = False
    for ours, before in zip((codes, quantized, margin), clean, strict=True):
        assert torch.equal(ours.transpose(1, 2)[others], before.transpose(1, 2)[others])


def test_lengths(make: Any) -> None:
    q = make(batch=4)
    lengths = torch.tensor([30, 0, 1, 17])
    poisoned = testing.poison_past_lengths(q.z, lengths.to(q.z.device))
    got = q.search(poisoned, lengths=lengths, return_quantized=True, return_margin=True)
    for i, n in enumerate(lengths.tolist()):
        alone = q.search(q.z[i : i + 1, :, :n], return_quantized=True, return_margin=True)
        for ours, theirs in zip(got, alone, strict=True):
            assert torch.equal(ours[i : i + 1, :, :n], theirs) and not ours[i, :, n:].any()


def test_packed_gives_the_same_bits_and_reads_the_shapes_alone(make: Any) -> None:
    q = make()
    packed = packing.pack_rvq(**q.weights)
    shapes = {k: torch.zeros(1, device=v.device).expand(v.shape) for k, v in q.weights.items()}
    ours = ops.rvq_search(q.z, **shapes, packed=packed, return_quantized=True)
    expected = q.search(return_quantized=True)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
    out = {k: shapes[k] for k in ("codebooks", "out_weight", "out_bias")}
    total = ops.rvq_lookup(ours[0], **out, packed=packed)
    assert torch.equal(total, expected[1]), "the sum of a search has the bits of a lookup"
    assert torch.equal(total, ops.rvq_lookup(ours[0], **{k: q.weights[k] for k in out}))


def test_bits_do_not_depend_on_the_batch_or_the_tile(make: Any) -> None:
    q = make(channels=40, frames=37, entries=130, stages=2, batch=2)
    whole = q.search(return_quantized=True, return_margin=True)
    again = q.search(return_quantized=True, return_margin=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    for i in range(2):
        alone = q.search(q.z[i : i + 1], return_quantized=True, return_margin=True)
        assert all(torch.equal(a, b[i : i + 1]) for a, b in zip(alone, whole, strict=True))
    parts = [q.search(part, return_quantized=True)[1] for part in q.z.split([1, 2, 17, 17], dim=-1)]
    assert torch.equal(torch.cat(parts, -1), whole[1])


@pytest.mark.parametrize(
    "change, text",
    [
        ({"z": torch.zeros(20, 30)}, r"z must be \[B, C, T\], got \[20, 30\]"),
        ({"z": torch.zeros(2, 19, 30)}, r"z must be \[B, C, F\] with C = 20, got \[2, 19, 30\]"),
        ({"codebooks": torch.zeros(4, 1024)}, r"codebooks must be \[Q, N, D\], got \[4, 1024\]"),
        ({"codebooks": torch.zeros(3, 65537, 8)}, r"N in 1..65536, D in 1..64\], got \[3, 65537, 8\]"),
        (
            {"in_weight": torch.zeros(3, 7, 20)},
            r"in_weight must be \[Q, D, C\] = \[3, 8, 20\], got \[3, 7, 20\]",
        ),
        ({"in_bias": torch.zeros(3, 7)}, r"in_bias must be \[Q, D\] = \[3, 8\], got \[3, 7\]"),
        (
            {"out_weight": torch.zeros(3, 20, 7)},
            r"out_weight must be \[Q, C, D\] = \[3, 20, 8\], got \[3, 20, 7\]",
        ),
        ({"out_bias": torch.zeros(2, 20)}, r"out_bias must be \[Q, C\] = \[3, 20\], got \[2, 20\]"),
        ({"num_quantizers": 4}, "num_quantizers must be in 1..3, got 4"),
        ({"num_quantizers": 0}, "num_quantizers must be in 1..3, got 0"),
        ({"lengths": torch.tensor([31, 0])}, r"lengths\[0\] must be in 0..30, got 31"),
        ({"packed": torch.zeros(3)}, "packed must be a contiguous Float tensor of"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_search_errors(make: Any, device: str, change: dict[str, Any], text: str) -> None:
    q = make()
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=f"rvq_search: .*({text})") as raised:
        ops.rvq_search(**{"z": q.z, **q.weights, **moved})
    assert "\n" not in str(raised.value)


def test_search_opcheck(make: Any) -> None:
    q = make()
    weights = list(q.weights.values())
    suite.check_opcheck("rvq_search", q.z, *weights, 3, True, True, torch.tensor([30, 4]), None, namespace=NAMESPACE)
    packed = packing.pack_rvq(**q.weights)
    suite.check_opcheck("rvq_search", q.z, *weights, 2, False, False, None, packed, namespace=NAMESPACE)
    suite.check_opcheck("pack_rvq", *weights, namespace=NAMESPACE)


def test_search_compiles(make: Any) -> None:
    q = make()
    compiled_call = torch.compile(lambda z: q.search(z, return_quantized=True)[:2], fullgraph=True, backend="aot_eager")
    for ours, eager in zip(compiled_call(q.z), q.search(return_quantized=True)[:2], strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.parametrize("stages, entries, dim", [(1, 33, 8), (3, 50, 5), (11, 1024, 8), (2, 1, 1), (2, 70, 64)])
def test_lookup(lookup: Any, stages: int, entries: int, dim: int) -> None:
    codes, weights, addend = lookup(stages=stages, entries=entries, dim=dim)
    compiled_lookup.check(codes, weights, addend)
    compiled_lookup.check(codes[:, :1], weights, None)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_lookup_dtypes(lookup: Any, dtype: torch.dtype) -> None:
    codes, weights, addend = lookup(channels=144, frames=18, entries=200)
    compiled_lookup.check(codes, weights, addend, dtype)
    for code_dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(ops.rvq_lookup(codes.to(code_dtype), **weights), ops.rvq_lookup(codes, **weights))


def test_lookup_strides_and_edge_sizes(lookup: Any) -> None:
    codes, weights, addend = lookup(channels=19)
    expected = ops.rvq_lookup(codes, **weights, addend=addend)
    for name, view in testing.strided_copies(addend).items():
        y = ops.rvq_lookup(codes, **weights, addend=view)
        assert torch.equal(y, expected), name
        assert y.stride(1) == 1 if view.stride(1) == 1 else y.is_contiguous(), name
    assert torch.equal(ops.rvq_lookup(codes.mT.contiguous().mT, **weights, addend=addend), expected)
    last = ops.rvq_lookup(codes, **weights, channels_last=True)
    assert last.stride(1) == 1 and torch.equal(last, ops.rvq_lookup(codes, **weights))
    for frames in (0, 1):
        for batch in (0, 2):
            compiled_lookup.check(*lookup(frames=frames, batch=batch))


def test_lookup_lengths(lookup: Any) -> None:
    codes, weights, addend = lookup(batch=4)
    lengths = torch.tensor([30, 0, 1, 17], device=codes.device)
    past = torch.arange(30, device=codes.device) >= lengths[:, None, None]
    behind = torch.where(past, torch.tensor(10**9, device=codes.device), codes)
    y = ops.rvq_lookup(behind, **weights, addend=testing.poison_past_lengths(addend, lengths), lengths=lengths)
    for i, n in enumerate(lengths.tolist()):
        alone = ops.rvq_lookup(codes[i : i + 1, :, :n], **weights, addend=addend[i : i + 1, :, :n])
        assert torch.equal(y[i : i + 1, :, :n], alone) and not y[i, :, n:].any()


@pytest.mark.parametrize("value", [50, -1, 2**40])
def test_a_code_out_of_range_is_named(lookup: Any, value: int) -> None:
    codes, weights, _ = lookup()
    codes[1, 2, 7] = value
    codes[1, 2, 20] = value
    with pytest.raises(ValueError, match=rf"codes must be in \[0, 50\), got {value} at batch 1, stage 2, frame 7"):
        ops.rvq_lookup(codes, **weights)


def test_lookup_gradient(lookup: Any) -> None:
    codes, weights, addend = lookup(channels=4, frames=5, entries=6, dim=3)
    leaves = [t.clone().requires_grad_() for t in [*weights.values(), addend]]
    same = [t.detach().clone().requires_grad_() for t in leaves]
    ops.rvq_lookup(codes, *leaves).square().sum().backward()
    reference.rvq_lookup_ref(codes, *same).square().sum().backward()
    for ours, theirs in zip(leaves, same, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"codes": torch.zeros(2, 30, dtype=torch.int64)}, r"codes must be \[B, q, F\], got \[2, 30\]"),
        ({"codes": torch.zeros(2, 3, 30)}, "codes must be integers, got Float"),
        ({"codes": torch.zeros(2, 4, 30, dtype=torch.int64)}, r"codes must have 1..3 stages, got \[2, 4, 30\]"),
        ({"out_bias": torch.zeros(3, 19)}, r"out_bias must be \[Q, C\] = \[3, 20\], got \[3, 19\]"),
        ({"addend": torch.zeros(2, 20, 29)}, r"addend must be \[B, C, F\] = \[2, 20, 30\], got \[2, 20, 29\]"),
        ({"lengths": torch.tensor([31, 0])}, r"lengths\[0\] must be in 0..30, got 31"),
        ({"packed": torch.zeros(3)}, "packed must be a contiguous Float tensor of"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_lookup_errors(lookup: Any, device: str, change: dict[str, Any], text: str) -> None:
    codes, weights, addend = lookup()
    moved = {k: v.to(device) for k, v in change.items()}
    with pytest.raises(ValueError, match=f"rvq_lookup: {text}") as raised:
        ops.rvq_lookup(**{"codes": codes, **weights, "addend": addend, **moved})
    assert "\n" not in str(raised.value)


def test_lookup_opcheck_and_compile(lookup: Any) -> None:
    codes, weights, addend = lookup()
    w = [t.requires_grad_() for t in weights.values()]
    args = (codes, *w, addend.requires_grad_(), torch.tensor([30, 4]), False, None)
    suite.check_opcheck("rvq_lookup", *args, namespace=NAMESPACE)
    suite.check_opcheck("rvq_lookup", codes, *[t.detach() for t in w], None, None, True, None, namespace=NAMESPACE)
    call = torch.compile(lambda c, a: ops.rvq_lookup(c, **weights, addend=a), fullgraph=True, backend="aot_eager")
    assert torch.equal(call(codes, addend), ops.rvq_lookup(codes, **weights, addend=addend))
