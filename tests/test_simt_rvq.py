"""The CUDA kernels of rvq_search and rvq_lookup on the CPU, under sanitizers: see tests/simt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import simt_cases as simt
import torch
from tolerances import TOLERANCE
from torch import Tensor

from dualcodec_ext import reference, testing
from dualcodec_ext.ops import packing

pytestmark = pytest.mark.skipif(bool(simt.missing()), reason=simt.missing() or "it can run")

Case = dict[str, Any]
Result = dict[str, Tensor]

# Multiprocessors of the GPU that a case pretends to have: they choose the frames in a tile.
FEW_FRAMES = {"multiprocessors": 10_000}
TILE_EACH = {"multiprocessors": 5}  # for 11 to 80 frames: blocks of twice the threads
SOME_FRAMES = {"multiprocessors": 30}  # for 8 to 60 frames


@dataclass
class Quantizer:
    z: Tensor  # [B, C, F]
    weights: dict[str, Tensor]

    def shape(self) -> tuple[int, int, int]:
        stages, entries, dim = self.weights["codebooks"].shape
        return stages, entries, dim

    def packed(self) -> Tensor:
        return packing.pack_rvq(**{k: v.float() for k, v in self.weights.items()})

    def case(self, z: Tensor | None = None, **options: Any) -> Case:
        """z as it lies in memory, from its first element to its last."""
        z = self.z if z is None else z
        span = 1 + sum((n - 1) * s for n, s in zip(z.shape, z.stride(), strict=True))
        stages, entries, dim = self.shape()
        return {
            "z": z.as_strided((span,), (1,), z.storage_offset()),
            "shape": torch.tensor(z.shape),
            "strides": torch.tensor(z.stride()),
            "packed": self.packed(),
            "stages": stages,
            "entries": entries,
            "dim": dim,
            **options,
        }


def quantizer(
    channels: int = 20,
    frames: int = 30,
    stages: int = 3,
    entries: int = 50,
    dim: int = 8,
    batch: int = 1,
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


@pytest.fixture(scope="module")
def ran() -> set[str]:
    """The names of the kernels that the tests of this file have run."""
    return set()


Run = Callable[..., list[Result]]


@pytest.fixture
def search(tmp_path: Path, ran: set[str]) -> Run:
    return lambda *cases, seed=1: _run("rvq_search", tmp_path, ran, cases, seed)


@pytest.fixture
def lookup(tmp_path: Path, ran: set[str]) -> Run:
    return lambda *cases, seed=1: _run("rvq_lookup", tmp_path, ran, cases, seed)


def _run(op: str, folder: Path, ran: set[str], cases: Any, seed: int) -> list[Result]:
    results, kernels = simt.run(simt.program(op), folder, cases, seed)
    ran |= kernels
    return results


def same(ours: Result, theirs: Result) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[k].nan_to_num(nan=-12345.0), theirs[k].nan_to_num(nan=-12345.0)) for k in ours
    )


# ---- rvq_search

SHAPES: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "12hz: a tile and a tail": ({"channels": 1024, "stages": 7, "entries": 4096, "frames": 19}, {}),
    "25hz: a small tile": ({"channels": 1024, "stages": 11, "entries": 1024, "frames": 6}, {"multiprocessors": 4}),
    "semantic: one frame": ({"channels": 1024, "stages": 1, "entries": 16384, "frames": 1}, FEW_FRAMES),
    "semantic: a tile": ({"channels": 768, "stages": 1, "entries": 16384, "frames": 16}, {}),
    "33 stages": ({"channels": 40, "stages": 33, "entries": 20, "frames": 7}, {"multiprocessors": 5}),
    "33 entries, clips in one tile": ({"entries": 33, "frames": 7, "batch": 5}, {"shared_bytes": 65536}),
    "one entry": ({"entries": 1, "frames": 20}, {}),
    "2600 channels": ({"channels": 2600, "frames": 3, "stages": 7}, {"multiprocessors": 1, "shared_bytes": 101376}),
    "D=64": ({"dim": 64, "entries": 33, "channels": 100, "frames": 6, "stages": 5}, {}),
    "D=3, 65536 entries": ({"dim": 3, "entries": 65536, "frames": 3, "stages": 1, "channels": 33}, {}),
    "D=3": ({"dim": 3, "entries": 33, "channels": 7, "frames": 2, "batch": 4}, FEW_FRAMES),
    "D=1": ({"dim": 1, "stages": 2, "entries": 17, "frames": 9}, {}),
}


@pytest.mark.parametrize("shape, options", SHAPES.values(), ids=SHAPES.keys())
def test_search_against_float64(shape: dict[str, int], options: dict[str, int], search: Run) -> None:
    q = quantizer(**shape)
    got, plain = search(q.case(margins=1, sums=1, **options), q.case(**options))
    codes = got["codes"]
    assert torch.equal(codes, plain["codes"])
    doubles = {k: v.double() for k, v in q.weights.items()}
    expected, _, margins = reference.rvq_search_ref(q.z.double(), **doubles, return_margin=True)
    bound = testing.rvq_margin_bound(q.z, **q.weights)
    report = testing.compare_codes(codes, expected, margins, bound)
    assert report.excused <= max(1, report.total // 200)
    finite = margins.isfinite() & (codes == expected).all(1)[:, None]
    assert ((got["margin"].double() - margins).abs()[finite] <= bound[finite]).all()
    assert torch.equal(got["margin"].isinf(), margins.isinf())
    out = {k: doubles[k] for k in ("codebooks", "out_weight", "out_bias")}
    testing.assert_close(got["quantized"], reference.rvq_lookup_ref(codes, **out), 6e-6)


@pytest.mark.parametrize("dim", [8, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_search_dtypes_and_strides(dtype: torch.dtype, dim: int, search: Run) -> None:
    q = quantizer(frames=9, batch=2, channels=35, stages=2, dim=dim, entries=200)
    z = q.z.to(dtype)
    copies = [copy for name, copy in testing.strided_copies(z).items() if dtype == torch.float32 or "slice" in name]
    wide = q.case(z.float(), sums=1, margins=1)
    last = [q.case(copy, sums=1, margins=1, frames_first=i % 2) for i, copy in enumerate(copies)]
    alone = [q.case(copy, sums=1, frames_first=i % 2, **TILE_EACH) for i, copy in enumerate(copies)]
    expected, *results = search(wide, *last)
    for got, plain in zip(results, search(*alone), strict=True):
        assert dim != 8 or same(plain, {k: got[k] for k in plain})
    for i, got in enumerate(results):
        total = got["quantized"].transpose(1, 2) if i % 2 else got["quantized"]
        assert torch.equal(got["codes"], expected["codes"]) and torch.equal(got["margin"], expected["margin"])
        assert torch.equal(total, expected["quantized"].to(dtype))


@pytest.mark.parametrize("dim", [8, 4])
def test_search_bits_depend_neither_on_the_tile_nor_on_the_batch_nor_on_the_order(dim: int, search: Run) -> None:
    q = quantizer(channels=530, frames=7, batch=3, stages=2, entries=1100, dim=dim)
    options = {"sums": 1, "margins": 1}
    whole, some, few, tight, tightest = search(
        q.case(**options),
        q.case(**options, **SOME_FRAMES),
        q.case(**options, **FEW_FRAMES),
        q.case(**options, shared_bytes=101376),
        q.case(**options, shared_bytes=65536),
    )
    for other in (some, few, tight, tightest):
        assert same(other, whole)
    without = {k: v for k, v in whole.items() if k != "margin"}
    for seed in (1, 2, 3):
        for got in search(q.case(sums=1), q.case(sums=1, **TILE_EACH), q.case(sums=1, capability=75), seed=seed):
            assert same(got, without)
    for seed in (2, 3):
        assert same(search(q.case(**options), seed=seed)[0], whole)
    alone, part = search(q.case(q.z[2:3], **options), q.case(q.z[1:2, :, 4:6], **options))
    assert same(alone, {k: v[2:3] for k, v in whole.items()})
    assert same(part, {k: v[1:2, ..., 4:6] for k, v in whole.items()})


def test_search_prefixes_of_stages(search: Run) -> None:
    q = quantizer(stages=5, frames=5)
    whole, two, one, coarse = search(
        q.case(margins=1),
        q.case(margins=1, sums=1, used=2),
        q.case(margins=1, used=1, **FEW_FRAMES),
        q.case(sums=1, used=2),
    )
    assert same(coarse, {k: two[k] for k in coarse})
    for used, got in ((2, two), (1, one)):
        assert torch.equal(got["codes"], whole["codes"][:, :used])
        assert torch.equal(got["margin"], whole["margin"][:, :used])
    out = {k: q.weights[k].double() for k in ("codebooks", "out_weight", "out_bias")}
    testing.assert_close(two["quantized"], reference.rvq_lookup_ref(two["codes"], **out), 4e-6)


def tied(dim: int, period: int) -> Quantizer:
    """Every row comes again `period` entries later."""
    q = quantizer(dim=dim, entries=3000, frames=18, stages=2)
    q.weights["codebooks"] = q.weights["codebooks"][:, torch.arange(3000) % period]
    return q


@pytest.mark.parametrize("dim", [8, 5])
def test_search_ties_go_to_the_lowest_index(dim: int, search: Run) -> None:
    # Equal rows in one group of four, in other lanes and warps, and in the next pass of the same thread.
    for period in (2, 37, 1024):
        q = tied(dim, period)
        once = Quantizer(q.z, {**q.weights, "codebooks": q.weights["codebooks"][:, :period]})
        got, few, expected, plain, wide = search(
            q.case(margins=1),
            q.case(q.z[..., :2], margins=1, **FEW_FRAMES),
            once.case(margins=1),
            q.case(),
            q.case(**TILE_EACH),
        )
        assert torch.equal(got["codes"], expected["codes"]) and not got["margin"].any()
        assert torch.equal(plain["codes"], expected["codes"]) and torch.equal(wide["codes"], expected["codes"])
        assert torch.equal(few["codes"], expected["codes"][..., :2]) and not few["margin"].any()


@pytest.mark.parametrize("dim", [8, 5])
def test_search_zeros_choose_the_row_of_the_smallest_square(dim: int, search: Run) -> None:
    q = quantizer(dim=dim, stages=1, entries=700)
    q.weights["in_weight"].zero_()
    q.weights["in_bias"].zero_()
    q.weights["codebooks"][0, [613, 205]] = 0
    got, plain = search(q.case(margins=1), q.case())
    assert (got["codes"] == 205).all() and not got["margin"].any() and torch.equal(plain["codes"], got["codes"])


@pytest.mark.parametrize("dim", [8, 5])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_search_frames_that_are_not_finite(value: float, dim: int, search: Run) -> None:
    q = quantizer(dim=dim, frames=18)
    z = q.z.clone()
    z[0, 3, [0, 17]] = value
    clean, got, plain = search(q.case(sums=1, margins=1), q.case(z, sums=1, margins=1), q.case(z, sums=1))
    assert same(plain, {k: got[k] for k in plain})
    for name in got:
        assert torch.equal(got[name][..., 1:17], clean[name][..., 1:17])
    broken = {k: v[..., [0, 17]] for k, v in got.items()}
    assert not broken["codes"].any() and broken["quantized"].isnan().all() and broken["margin"].isnan().all()


def test_search_of_squares_that_overflow(search: Run) -> None:
    q = quantizer(stages=1)
    for bias in ("in_bias", "out_bias"):
        q.weights[bias].zero_()
    plain, huge = search(q.case(), q.case(q.z * 2.0**100))
    assert torch.equal(plain["codes"], huge["codes"])


@pytest.mark.parametrize("dim", [8, 5])
def test_search_lengths(dim: int, search: Run) -> None:
    q = quantizer(frames=11, batch=4, dim=dim)
    given = torch.tensor([4, 0, 99, -5])  # the device's lengths are not read back: the kernel clamps them
    lengths = given.clamp(0, 11)
    z = testing.poison_past_lengths(q.z, lengths)
    whole, got, plain = search(
        q.case(sums=1, margins=1), q.case(z, sums=1, margins=1, lengths=given), q.case(z, sums=1, lengths=given)
    )
    assert same(plain, {k: got[k] for k in plain})
    for i, n in enumerate(lengths.tolist()):
        for name in got:
            assert torch.equal(got[name][i, :, :n], whole[name][i, :, :n]) and not got[name][i, :, n:].any()


def clustered(spread: float, entries: int = 1000, **shape: int) -> Quantizer:
    """Rows in 20 clusters: many rows are nearly as near as the nearest one."""
    q = quantizer(entries=entries, **shape)
    books = q.weights["codebooks"]
    q.weights["codebooks"] = books[:, torch.arange(entries) % 20] + spread * books
    return q


@pytest.mark.parametrize("spread", [0.1, 1e-2, 1e-6, 0.0])
def test_search_of_rows_that_bytes_do_not_tell_apart(spread: float, search: Run) -> None:
    q = clustered(spread, frames=20, stages=2)
    whole, coarse, wide = search(q.case(margins=1), q.case(), q.case(**TILE_EACH))
    assert torch.equal(coarse["codes"], whole["codes"]) and torch.equal(wide["codes"], whole["codes"])


@pytest.mark.parametrize(
    "row", [torch.zeros(8), torch.full((8,), torch.nan), torch.full((8,), 1e-20)], ids=["zero", "NaN", "short"]
)
def test_search_of_a_stage_that_bytes_may_not_be_used_for(row: Tensor, search: Run) -> None:
    q = quantizer(frames=18, entries=600)
    q.weights["codebooks"][1, 77] = row
    whole, coarse, wide = search(q.case(margins=1), q.case(), q.case(**TILE_EACH))
    assert torch.equal(coarse["codes"], whole["codes"]) and torch.equal(wide["codes"], whole["codes"])


def test_search_of_more_stages_than_lanes_have_columns(search: Run) -> None:
    q = quantizer(channels=600, frames=18, stages=33, entries=20)
    whole, coarse = search(q.case(margins=1, sums=1), q.case(sums=1, **TILE_EACH))
    assert same(coarse, {k: whole[k] for k in coarse})


def test_search_needs_shared_memory_for_its_code_space(search: Run) -> None:
    q = quantizer(dim=64, stages=5, entries=4, frames=1)
    with pytest.raises(simt.Failed, match="more shared memory"):
        search(q.case(shared_bytes=3000))


# ---- rvq_lookup


def lookup_case(
    channels: int = 20,
    frames: int = 30,
    stages: int = 3,
    entries: int = 50,
    dim: int = 8,
    batch: int = 2,
    used: int | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[Case, Tensor]:
    """A case with an addend, and what float64 makes of it."""
    q = quantizer(channels, frames, stages, entries, dim, batch, seed=1)
    codes = torch.randint(0, entries, (batch, used or stages, frames), generator=torch.Generator().manual_seed(2))
    addend = q.z.to(dtype)
    weights = {k: q.weights[k] for k in ("codebooks", "out_weight", "out_bias")}
    weights["out_weight"] = weights["out_weight"] / stages**0.5
    doubles = {k: v.double() for k, v in weights.items()}
    q.weights.update(weights)
    sizes = {"stages": stages, "entries": entries, "dim": dim, "channels": channels}
    laid = addend.transpose(1, 2) if options.get("frames_first") else addend
    case = {"codes": codes, "packed": q.packed(), "addend": laid, **sizes, **options}
    return case, reference.rvq_lookup_ref(codes, **doubles, addend=addend.double())


LOOKUPS: dict[str, dict[str, Any]] = {
    "12hz: tiles and tails": {"channels": 1024, "stages": 7, "entries": 4096, "frames": 37, "batch": 1},
    "semantic: one frame": {"channels": 1024, "stages": 1, "entries": 16384, "frames": 1, "batch": 1},
    "a prefix of 32 stages": {"stages": 32, "used": 30, "channels": 129},
    "D=64": {"dim": 64, "channels": 130, "entries": 33},
    "D=3, one frame": {"dim": 3, "frames": 1},
    "D=1": {"dim": 1, "channels": 1},
    "a frame alone, bf16": {"frames": 1, "batch": 3, "channels": 200, "dtype": torch.bfloat16},
    "frames alone, f16, as they lie": {"frames": 4, "channels": 130, "dtype": torch.float16, "frames_first": 1},
    "many stages, few frames": {"stages": 32, "used": 30, "channels": 129, "frames": 3},
    "a large GPU": {"channels": 1024, "stages": 7, "frames": 37, "batch": 1, "multiprocessors": 132},
    "a large GPU, D=5": {"dim": 5, "channels": 130, "frames_first": 1, "multiprocessors": 132},
}


@pytest.mark.parametrize("shape", LOOKUPS.values(), ids=LOOKUPS.keys())
def test_lookup_against_float64(shape: dict[str, Any], lookup: Run) -> None:
    case, expected = lookup_case(**shape)
    (got,) = lookup(case)
    y = got["y"].transpose(1, 2) if shape.get("frames_first") else got["y"]
    testing.assert_close(y, expected, TOLERANCE["rvq_lookup", shape.get("dtype", torch.float32)])
    assert got["error"] == torch.iinfo(torch.int64).max


def test_lookup_rounds_no_more_than_plain_pytorch(lookup: Run) -> None:
    case, expected = lookup_case(1024, 100, 7, 200, batch=1)
    q = quantizer(1024, 100, 7, 200, seed=1)
    weights = {k: q.weights[k] for k in ("codebooks", "out_weight", "out_bias")}
    weights["out_weight"] = weights["out_weight"] / 7**0.5
    plain = reference.rvq_lookup_ref(case["codes"], **weights, addend=q.z)
    testing.assert_close_to_f64(lookup(case)[0]["y"], expected, plain)


def test_lookup_without_addend_is_the_sum_of_the_search(search: Run, lookup: Run) -> None:
    for dim in (8, 5):
        q = quantizer(channels=150, frames=19, dim=dim)
        (found,) = search(q.case(sums=1))
        sizes = {"stages": 3, "entries": 50, "dim": dim, "channels": 150}
        case = {"codes": found["codes"], "packed": q.packed(), **sizes}
        few = {**case, "codes": found["codes"][..., 4:5]}
        whole, one = lookup(case, few)
        assert torch.equal(whole["y"], found["quantized"]) and torch.equal(one["y"], whole["y"][..., 4:5])


def test_lookup_seeds_and_tiles_give_the_same_bits(lookup: Run) -> None:
    case, _ = lookup_case(channels=150)
    first, *others = [lookup(case, seed=seed)[0] for seed in (1, 2, 3)] + lookup({**case, "multiprocessors": 132})
    assert all(same(first, other) for other in others)


@pytest.mark.parametrize("frames", [30, 8], ids=["tiles", "frames alone"])
@pytest.mark.parametrize("dim", [8, 5])
def test_lookup_of_codes_out_of_range(dim: int, frames: int, lookup: Run) -> None:
    clean, _ = lookup_case(dim=dim, channels=200, frames=frames)
    codes = clean["codes"].clone()
    codes[1, 2, 5], codes[1, 0, 7], codes[0, 1, frames - 1] = 50, -1, 2**40
    expected, got, quiet = lookup(clean, {**clean, "codes": codes}, {**clean, "codes": codes, "tells": 0})
    assert got["error"] == 1 * frames + frames - 1 and "error" not in quiet
    broken = (codes != clean["codes"]).any(1)
    assert torch.equal(got["y"].isnan(), broken[:, None].expand_as(got["y"]))
    keep = ~broken[:, None].expand_as(got["y"])
    assert torch.equal(got["y"][keep], expected["y"][keep]) and same({"y": got["y"]}, quiet)


@pytest.mark.parametrize("frames", [11, 4], ids=["tiles", "frames alone"])
def test_lookup_lengths(frames: int, lookup: Run) -> None:
    case, _ = lookup_case(frames=frames, batch=4)
    given = torch.tensor([3, 0, 99, -5])
    lengths = given.clamp(0, frames)
    past = torch.arange(frames) >= lengths[:, None]
    codes = case["codes"].masked_fill(past[:, None], -7)
    addend = testing.poison_past_lengths(case["addend"], lengths)
    whole, got = lookup(case, {**case, "codes": codes, "addend": addend, "lengths": given})
    assert torch.equal(got["y"], reference.ops.mask_past_lengths(whole["y"], lengths))
    assert got["error"] == torch.iinfo(torch.int64).max


# ---- the tests themselves


def test_every_kernel_has_run(ran: set[str], request: pytest.FixtureRequest) -> None:
    if len(request.session.items) < 20:
        pytest.skip("the other tests of this file were left out")
    search = {f"dcx::RvqSearch<8, {f}, {m}>" for f in (16, 4, 1) for m in ("true", "false")}
    search |= {f"dcx::RvqSearch<0, {f}, true>" for f in (4, 1)} | {f"dcx::RvqSearchCoarse<{n}>" for n in (512, 256)}
    assert ran == search | {f"dcx::RvqLookup<{d}, {f}>" for d in (8, 0) for f in (16, 4, 1)}
