"""rvq_search: codes, margins and the quantised sum, every stage in one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import opsuite as suite
import pytest
import torch
from torch import Tensor

from dualcodec_ext import ops, reference, testing
from dualcodec_ext.ops import packing


@dataclass
class Quantizer:
    z: Tensor
    weights: dict[str, Tensor]

    def search(self, z: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return ops.rvq_search(self.z if z is None else z, **self.weights, **options)

    def reference(self, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Tensor, Any, Any]:
        weights = {k: v.to(dtype) for k, v in self.weights.items()}
        return reference.rvq_search_ref(self.z.to(dtype), **weights, **options)

    def to(self, dtype: torch.dtype) -> Quantizer:
        return Quantizer(self.z.to(dtype), {k: v.to(dtype) for k, v in self.weights.items()})


def make(
    channels: int = 20,
    frames: int = 30,
    stages: int = 3,
    entries: int = 50,
    dim: int = 8,
    batch: int = 2,
    seed: int = 0,
) -> Quantizer:
    gen = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen)

    return Quantizer(
        noise(batch, channels, frames),
        {
            "in_weight": noise(stages, dim, channels) / channels**0.5,
            "in_bias": 0.1 * noise(stages, dim),
            "codebooks": noise(stages, entries, dim),
            "out_weight": 0.5 * noise(stages, channels, dim) / dim**0.5,
            "out_bias": 0.1 * noise(stages, channels),
        },
    )


SHAPES = {
    "one stage": {"stages": 1},
    "33 entries": {"entries": 33},
    "one entry": {"entries": 1},
    "fifteen entries": {"entries": 15, "dim": 3},
    "D=1": {"dim": 1},
    "D=5": {"dim": 5, "stages": 4},
    "D=64": {"dim": 64, "channels": 100},
    "one frame": {"frames": 1, "batch": 1},
    "eleven stages": {"stages": 11, "entries": 64, "frames": 9},
}
CODEC = {
    "12hz acoustic": {"channels": 1024, "stages": 7, "entries": 4096, "frames": 60, "batch": 1},
    "25hz acoustic": {"channels": 1024, "stages": 11, "entries": 1024, "frames": 60, "batch": 1},
    "semantic": {"channels": 768, "stages": 1, "entries": 16384, "frames": 60, "batch": 1},
    "65536 entries": {"channels": 64, "stages": 1, "entries": 65536, "frames": 5, "batch": 1},
}


def check(q: Quantizer) -> testing.CodeReport:
    """Codes as the float64 reference's where its margin is above what rounding can move; then margins and sums."""
    with testing.poisoned_memory():
        codes, quantized, margin = q.search(return_quantized=True, return_margin=True)
    expected, _, margins = q.reference(return_margin=True)
    bound = testing.rvq_margin_bound(q.z, **q.weights)
    report = testing.compare_codes(codes, expected, margins, bound)
    same = (codes == expected).all(1)  # [B, F]: later stages of another residual can't be compared
    finite = margins.isfinite() & same[:, None]
    assert ((margin.double() - margins).abs()[finite] <= bound[finite]).all()
    assert torch.equal(margin.isinf(), margins.isinf())
    # Teacher-forced: the sum that belongs to the codes that were chosen.
    w = {k: q.weights[k].double() for k in ("codebooks", "out_weight", "out_bias")}
    total = reference.rvq_lookup_ref(codes, **w)
    testing.assert_close(quantized, total, 4e-6)
    return report


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("isa", suite.instruction_sets())
def test_forward(shape: dict[str, Any], isa: str) -> None:
    with suite.instruction_set(isa):
        report = check(make(**shape))
    assert report.excused <= report.total // 100


@pytest.mark.parametrize("shape", CODEC.values(), ids=CODEC.keys())
def test_codec_shapes(shape: dict[str, Any]) -> None:
    report = check(make(**shape))
    assert report.excused <= max(1, report.total // 200)


def test_every_prefix_of_stages() -> None:
    q = make(stages=4)
    whole, _, margins = q.search(return_margin=True)
    for n in range(1, 5):
        codes, quantized, margin = q.search(num_quantizers=n, return_quantized=True, return_margin=True)
        assert torch.equal(codes, whole[:, :n]) and torch.equal(margin, margins[:, :n])
        w = {k: q.weights[k].double() for k in ("codebooks", "out_weight", "out_bias")}
        testing.assert_close(quantized, reference.rvq_lookup_ref(codes, **w), 4e-6)


def test_only_what_is_asked_for_comes() -> None:
    q = make()
    codes, quantized, margin = q.search()
    assert quantized is None and margin is None
    for options in ({"return_quantized": True}, {"return_margin": True}):
        assert torch.equal(q.search(**options)[0], codes)


def test_gradient_is_refused() -> None:
    q = make()
    z = q.z.clone().requires_grad_()
    quantized = q.search(z, return_quantized=True)[1]
    with pytest.raises(RuntimeError, match="rvq_search: has no gradient"):
        quantized.sum().backward()
    with torch.no_grad():
        assert torch.equal(q.search(z)[0], q.search()[0])


@pytest.mark.parametrize("dtype", suite.DTYPES, ids=str)
@pytest.mark.parametrize("isa", suite.instruction_sets())
def test_dtypes(dtype: torch.dtype, isa: str) -> None:
    """The search is float32 at least: a half-precision latent's codes are those of its values."""
    q = make(channels=40).to(dtype)
    with suite.instruction_set(isa):
        codes, quantized, margin = q.search(return_quantized=True, return_margin=True)
    expected, total, margins = q.to(torch.float64).reference(return_quantized=True, return_margin=True)
    bound = testing.rvq_margin_bound(q.z, **q.weights)
    testing.compare_codes(codes, expected, margins, bound)
    assert quantized.dtype == dtype and margin.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    same = (codes == expected).all(1, keepdim=True).expand(quantized.shape)
    limit = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert (quantized.double() - total).abs()[same].max() <= limit


def test_strides_and_slices() -> None:
    q = make(channels=19)
    expected = q.search(return_quantized=True)
    for name, z in testing.strided_copies(q.z).items():
        codes, quantized, _ = q.search(z, return_quantized=True)
        assert torch.equal(codes, expected[0]) and torch.equal(quantized, expected[1]), name
        assert quantized.stride(1) == 1 if z.stride(1) == 1 else quantized.is_contiguous(), name


@pytest.mark.parametrize("frames", suite.EDGE_STEPS)
def test_edge_sizes(frames: int) -> None:
    check(make(frames=frames)) if frames else None
    for batch in (0, 2):
        codes, quantized, margin = make(frames=frames, batch=batch).search(return_quantized=True, return_margin=True)
        assert codes.shape == margin.shape == (batch, 3, frames) and quantized.shape == (batch, 20, frames)


def test_ties_take_the_lowest_index() -> None:
    """Every row stands twice, in other registers, lanes and blocks; the first of the two must win."""
    for offset in (1, 7, 16, 40, 100):
        q = make(entries=offset, stages=2)
        once = q.search()[0]
        q.weights["codebooks"] = torch.cat([q.weights["codebooks"]] * 2, 1)
        codes, _, margin = q.search(return_margin=True)
        assert torch.equal(codes, once) and (margin == 0).all()


def test_a_zero_vector_takes_the_smallest_square() -> None:
    q = make(stages=1, dim=4)
    q.weights["in_weight"].zero_()
    q.weights["in_bias"].zero_()
    q.weights["codebooks"][0, [11, 30]] = 0.0  # they normalise to zero, the others to one
    assert (q.search()[0] == 11).all()
    assert torch.equal(q.search()[0], q.reference(torch.float32)[0])


def test_scale_does_not_matter() -> None:
    """Directions decide: rows and latents of 1e-6 and 1e12, whose squares leave float32's range, change no code."""
    q = make(stages=1)
    codes = q.search()[0]
    q.weights["in_bias"].zero_()
    codes = q.search()[0]
    for scale in (1e-6, 1e12, 1e25):
        assert torch.equal(Quantizer(q.z * scale, q.weights).search()[0], codes)
        rows = {**q.weights, "codebooks": q.weights["codebooks"] * scale}
        assert torch.equal(Quantizer(q.z, rows).search()[0], codes)


def test_nan_gives_code_0_and_a_nan_sum() -> None:
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


def test_lengths() -> None:
    q = make(batch=4)
    lengths = torch.tensor([30, 0, 1, 17])
    poisoned = testing.poison_past_lengths(q.z, lengths)
    got = q.search(poisoned, lengths=lengths, return_quantized=True, return_margin=True)
    for i, n in enumerate(lengths.tolist()):
        alone = q.search(q.z[i : i + 1, :, :n], return_quantized=True, return_margin=True)
        for ours, theirs in zip(got, alone, strict=True):
            assert torch.equal(ours[i : i + 1, :, :n], theirs) and not ours[i, :, n:].any()


def test_packed_gives_the_same_bits_and_reads_the_shapes_alone() -> None:
    q = make()
    packed = packing.pack_rvq(**q.weights)
    shapes = {k: torch.zeros(1).expand(v.shape) for k, v in q.weights.items()}
    ours = ops.rvq_search(q.z, **shapes, packed=packed, return_quantized=True)
    assert torch.equal(ours[0], q.search()[0]) and torch.equal(ours[1], q.search(return_quantized=True)[1])


@pytest.mark.parametrize(
    "change, text",
    [
        ({"z": torch.zeros(20, 30)}, r"z must be \[B, C, F\]|z must be \[B, C, T\], got \[20, 30\]"),
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
        ({"codebooks": None}, "codebooks must be a tensor, got NoneType"),
        ({"lengths": [3, 4]}, "lengths must be a tensor, got list"),
        ({"num_quantizers": 2.0}, "num_quantizers must be an integer, got 2.0"),
        ({"num_quantizers": 4}, "num_quantizers must be in 1..3, got 4"),
        ({"num_quantizers": 0}, "num_quantizers must be in 1..3, got 0"),
        ({"lengths": torch.tensor([31, 0])}, r"lengths\[0\] must be in 0..30, got 31"),
        ({"packed": torch.zeros(3)}, "packed must be a contiguous Float tensor of"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_errors(change: dict[str, Any], text: str) -> None:
    q = make()
    with pytest.raises(ValueError, match=f"rvq_search: .*({text})") as raised:
        ops.rvq_search(**{"z": q.z, **q.weights, **change})
    assert "\n" not in str(raised.value)


def test_opcheck() -> None:
    q = make()
    suite.check_opcheck("rvq_search", q.z, *q.weights.values(), 3, True, True, torch.tensor([30, 4]), None)
    suite.check_opcheck("rvq_search", q.z, *q.weights.values(), 2, False, False, None, packing.pack_rvq(**q.weights))
    suite.check_opcheck("pack_rvq", *q.weights.values())


def test_compiles() -> None:
    q = make()
    compiled = torch.compile(lambda z: q.search(z, return_quantized=True)[:2], fullgraph=True, backend="aot_eager")
    codes, quantized = compiled(q.z)
    assert torch.equal(codes, q.search()[0]) and torch.equal(quantized, q.search(return_quantized=True)[1])


def test_determinism() -> None:
    q = make(channels=128, frames=333, entries=500, batch=3)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(q.search(return_quantized=True, return_margin=True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    for i in range(3):
        alone = q.search(q.z[i : i + 1], return_quantized=True, return_margin=True)
        assert all(torch.equal(a, b[i : i + 1]) for a, b in zip(alone, results[0], strict=True))
    parts = [q.search(part, return_quantized=True)[1] for part in q.z.split([1, 2, 8, 61, 261], dim=-1)]
    assert torch.equal(torch.cat(parts, -1), results[0][1])
