"""rvq_search on the CPU gives the float64 definition's codes: what float32 can't decide is redone, and counted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import opsuite as suite
import pytest
import torch
from test_rvq_search import Quantizer, make
from torch import Tensor

from dualcodec_ext import build, ops

REAL = {
    "12hz acoustic": {"channels": 1024, "stages": 7, "entries": 4096, "frames": 250, "batch": 1},
    "25hz acoustic": {"channels": 1024, "stages": 11, "entries": 1024, "frames": 250, "batch": 1},
    "semantic": {"channels": 768, "stages": 1, "entries": 16384, "frames": 250, "batch": 1},
    "odd sizes": {"channels": 37, "stages": 5, "entries": 333, "dim": 5, "frames": 250, "batch": 3},
    "wide codes": {"channels": 100, "stages": 3, "entries": 500, "dim": 19, "frames": 250, "batch": 1},
}


@contextmanager
def bound_factor(factor: float) -> Iterator[None]:
    """The kernel's error bound times `factor`: 0 redoes nothing."""
    module = build.load_module()
    assert module is not None
    module.set_rvq_search_bound_factor(factor)
    try:
        yield
    finally:
        module.set_rvq_search_bound_factor(1.0)


@contextmanager
def slack_factor(factor: float) -> Iterator[None]:
    """The slack of the pass over bytes times `factor`: 0 keeps the best group alone, 1e9 every group."""
    module = build.load_module()
    assert module is not None
    module.set_rvq_search_slack_factor(factor)
    try:
        yield
    finally:
        module.set_rvq_search_slack_factor(1.0)


def with_bytes() -> list[Any]:
    """The instruction sets whose search starts with a pass over bytes."""
    return [isa for isa in suite.instruction_sets() if isa.values != ("generic",)]


def directions(e: Tensor, rows: Tensor) -> Quantizer:
    """One stage on eight channels whose e are those of `e` [F, 8], over `rows` [N, 8]."""
    q = make(channels=8, stages=1, entries=rows.shape[0], frames=1, batch=1)
    q.weights["in_weight"][0] = torch.eye(8)
    q.weights["in_bias"].zero_()
    q.weights["codebooks"] = rows[None].clone()
    q.z = e.t()[None].clone()
    return q


def near_ties(entries: int = 1024, frames: int = 600, channels: int = 256, seed: int = 0) -> Quantizer:
    """One stage whose rows come in pairs that are nearly as far from a frame's e: margins from 1e-9 to 1e-3.

    Frame f's e lies between rows 2f and 2f + 1, off the middle by a little; other rows are far away by comparison.
    """
    gen = torch.Generator().manual_seed(seed)
    q = make(channels=channels, stages=1, entries=entries, frames=frames, batch=1, seed=seed)
    weights = {k: v.double() for k, v in q.weights.items()}
    e = weights["in_weight"][0] @ q.z[0].double() + weights["in_bias"][0][:, None]  # [D, F]
    e = (e / e.norm(dim=0)).t()  # [F, D]
    pairs = entries // 2
    sideways = torch.randn(frames, e.shape[1], generator=gen, dtype=torch.float64)
    sideways -= (sideways * e).sum(1, keepdim=True) * e
    sideways *= 0.05 / sideways.norm(dim=1, keepdim=True)
    off = 10 ** (-8 + 6 * torch.rand(frames, 1, generator=gen, dtype=torch.float64))
    rows = torch.stack((e + sideways, e - sideways * (1 + off)), 1)[:pairs]  # [pairs, 2, D]
    swap = torch.rand(rows.shape[0], generator=gen) < 0.5
    rows[swap] = rows[swap].flip(1)
    book = q.weights["codebooks"][0]
    book[: 2 * rows.shape[0]] = (rows * 10 ** torch.randn(rows.shape[0], 2, 1, generator=gen)).flatten(0, 1).float()
    q.z = q.z[..., : min(frames, pairs)]
    return q


def differing(q: Quantizer) -> int:
    """How many codes are not float64's."""
    return int((q.search()[0] != q.reference()[0]).sum())


@pytest.mark.parametrize("isa", suite.instruction_sets())
@pytest.mark.parametrize("shape", REAL.values(), ids=REAL.keys())
def test_codes_are_float64s(shape: dict[str, int], isa: str) -> None:
    q = make(**shape, seed=3)
    with suite.instruction_set(isa):
        assert differing(q) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("isa", suite.instruction_sets())
def test_near_ties(dtype: torch.dtype, isa: str) -> None:
    """The frames are rounded first, which moves them off the middle; half of the margins stay below 1e-4."""
    q = near_ties()
    q.z = q.z.to(dtype)
    before = ops.rvq_search_stats()
    with suite.instruction_set(isa):
        assert differing(q) == 0
    if dtype == torch.float32:
        assert ops.rvq_search_stats().redone - before.redone > 100


def test_margins_of_redone_codes_are_float64s() -> None:
    q = near_ties()
    margin, exact = q.search(return_margin=True)[2], q.reference(return_margin=True)[2]
    unclear = exact < 4e-6  # below the search's own error, whatever e's
    assert unclear.sum() > 100
    torch.testing.assert_close(margin[unclear].double(), exact[unclear], rtol=1e-5, atol=1e-15)


@pytest.mark.parametrize("factor", [0.0, 1e-3])
@pytest.mark.parametrize("isa", suite.instruction_sets())
def test_a_bound_that_is_too_small_shows(factor: float, isa: str) -> None:
    """The near ties above do tell: without the redo, and with a bound below the real errors, codes differ."""
    with suite.instruction_set(isa), bound_factor(factor):
        assert sum(differing(near_ties(seed=seed)) for seed in range(3)) > 0


@pytest.mark.parametrize("isa", with_bytes())
def test_a_slack_that_is_too_small_shows(isa: str) -> None:
    """The byte whose row scores best is often not the nearest row's; the bound of the redo can't mend that."""
    q = make(**REAL["25hz acoustic"], seed=3)
    with suite.instruction_set(isa), slack_factor(0.0):
        assert differing(q) > 10


@pytest.mark.parametrize("margins", [False, True], ids=["codes", "margins"])
@pytest.mark.parametrize("shape", [*REAL.values(), {"entries": 1000, "dim": 3}], ids=[*REAL.keys(), "D=3"])
@pytest.mark.parametrize("isa", with_bytes())
def test_every_group_scored_changes_nothing(shape: dict[str, int], isa: str, margins: bool) -> None:
    """Codes, margins and which codes are redone are those of a float32 search of every row, bit for bit."""
    q = make(**shape, seed=5)
    found = []
    with suite.instruction_set(isa):
        for factor in (1.0, 1e9):
            with slack_factor(factor):
                ops.rvq_search_stats(reset=True)
                codes, _, margin = q.search(return_margin=margins)
                found.append((codes, margin, ops.rvq_search_stats(reset=True)))
    (codes, margin, stats), (all_codes, all_margin, all_stats) = found
    assert torch.equal(codes, all_codes) and stats == all_stats
    assert not margins or torch.equal(margin, all_margin)


@pytest.mark.parametrize("entries", [1, 2, 15, 16, 17, 255, 256, 257, 4095, 4097])
@pytest.mark.parametrize("isa", suite.instruction_sets())
def test_odd_numbers_of_rows(isa: str, entries: int) -> None:
    """The last group, and the groups that a pass of 256 rows has beyond it; the margin where there is one row only."""
    q = make(entries=entries, frames=67, stages=2, batch=1, seed=entries)
    with suite.instruction_set(isa):
        codes, _, margin = q.search(return_margin=True)
        parts = [q.search(part, return_margin=True) for part in q.z.split([1, 2, 3, 61], dim=-1)]
    expected, _, exact = q.reference(return_margin=True)
    assert torch.equal(codes, expected)
    assert entries == 1 or (margin.double() - exact).abs().max() < 1e-5
    assert torch.equal(torch.cat([p[0] for p in parts], -1), codes)
    assert torch.equal(torch.cat([p[2] for p in parts], -1), margin)


@pytest.mark.parametrize("isa", suite.instruction_sets())
def test_the_corners_of_the_bytes(isa: str) -> None:
    """The largest coordinates, and the largest sums that 16 bits must hold: every sign pattern and axis meets every."""
    signs = (torch.arange(256)[:, None] >> torch.arange(8) & 1).float() * 2 - 1
    axes = torch.cat((torch.eye(8), -torch.eye(8)))
    pairs = torch.cat([signs * (torch.arange(8) // 2 == i) for i in range(4)]).unique(dim=0)
    rows = torch.cat((signs, axes, pairs))
    noise = 1e-3 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    q = directions(rows + noise, rows)
    with suite.instruction_set(isa):
        assert torch.equal(q.search()[0][0, 0], torch.arange(rows.shape[0]))
        assert differing(directions(signs.roll(3, 1) * 1e-6 + noise[:256], rows)) == 0


@pytest.mark.parametrize("isa", suite.instruction_sets())
def test_rows_of_every_length(isa: str) -> None:
    """Rows are compared by direction, but for those too short to have one: they lie at the middle of the sphere."""
    gen = torch.Generator().manual_seed(0)
    rows, e = torch.randn(2, 600, 8, generator=gen)
    with suite.instruction_set(isa):
        for scale in (1e-11, 1e15):
            assert differing(directions(e, rows * scale)) == 0
        rows[100] = 0
        rows[200] *= 1e-13
        assert differing(directions(e, rows)) == 0
        rows[:, 0] = rows[:, 0].abs() + 3  # a zero row is nearer to what looks away from all others
        rows[100] = 0
        away = directions(torch.cat((-rows[:50], e)), rows)
        assert differing(away) == 0 and (away.search()[0][..., :50] == 100).all()


@pytest.mark.parametrize("isa", suite.instruction_sets())
def test_frames_that_are_not_finite_leave_their_neighbours_alone(isa: str) -> None:
    q = make(entries=500, frames=40, batch=1)
    with suite.instruction_set(isa):
        codes = q.search()[0]
        for bad in (torch.nan, torch.inf, -torch.inf):
            z = q.z.clone()
            z[0, 3, ::7] = bad
            got = q.search(z)[0]
            kept = torch.arange(40) % 7 != 0
            assert torch.equal(got[..., kept], codes[..., kept]) and not got[..., ~kept].any()


def test_ties_take_the_lowest_index() -> None:
    """Equal rows, and rows that are equal once normalised, in other registers, lanes and passes.

    Not compared with the reference: a library's product may give equal rows scores one rounding apart.
    """
    for offset in (1, 7, 16, 40, 100, 1000):
        q = make(entries=offset, stages=3)
        once = q.search()[0]
        books = q.weights["codebooks"]
        q.weights["codebooks"] = torch.cat((books, books), 1)
        before = ops.rvq_search_stats()
        codes, _, margin = q.search(return_margin=True)
        after = ops.rvq_search_stats()
        assert torch.equal(codes, once) and not margin.any()
        assert after.redone - before.redone == codes.numel() == after.codes - before.codes
        q.weights["codebooks"] = torch.cat((books, 4 * books), 1)
        assert torch.equal(q.search(num_quantizers=1)[0], once[:, :1])


def test_every_row_the_same() -> None:
    q = make(entries=700, stages=2)
    q.weights["codebooks"][:] = q.weights["codebooks"][:, :1]
    codes, _, margin = q.search(return_margin=True)
    assert not codes.any() and not margin.any()


def test_ranges_that_float32_leaves() -> None:
    """Squares, projections and sums may overflow or vanish in float32: float64 decides there too."""
    q = make(stages=2, channels=64)
    q.weights["in_bias"].zero_()
    q.weights["out_bias"].zero_()
    for scale in (1e-20, 1e-13, 1e20, 3e37):  # below, float64's own rounding decides
        scaled = Quantizer(q.z * scale, q.weights)
        assert differing(scaled) == 0, scale
    q.weights["in_weight"].zero_()
    q.weights["in_bias"].fill_(1e-13)  # a vector shorter than what normalisation divides by
    assert differing(q) == 0


def test_prefixes_lengths_and_cuts_change_nothing() -> None:
    q = near_ties(frames=300)
    codes, _, margin = q.search(return_margin=True)
    parts = [q.search(part, return_margin=True) for part in q.z.split([1, 5, 94, 200], dim=-1)]
    assert torch.equal(torch.cat([p[0] for p in parts], -1), codes)
    assert torch.equal(torch.cat([p[2] for p in parts], -1), margin)
    short = q.search(lengths=torch.tensor([77]), return_margin=True)
    assert torch.equal(short[0][..., :77], codes[..., :77]) and not short[0][..., 77:].any()


def test_the_counts() -> None:
    q = make(channels=64, stages=4, frames=50, batch=2)
    ops.rvq_search_stats(reset=True)
    q.search(num_quantizers=3, lengths=torch.tensor([50, 8]))
    assert ops.rvq_search_stats().codes == 3 * 58
    q.to(torch.float64).search()
    assert ops.rvq_search_stats(reset=True).codes == 3 * 58
    assert ops.rvq_search_stats() == (0, 0)


def test_counts_of_several_threads_add_up() -> None:
    q = near_ties(frames=200)
    ops.rvq_search_stats(reset=True)
    q.search()
    once = ops.rvq_search_stats(reset=True)
    threads = [threading.Thread(target=q.search) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert once.redone > 0 and ops.rvq_search_stats(reset=True) == (8 * once.codes, 8 * once.redone)


def test_few_codes_are_redone() -> None:
    """A redo costs several times a search: on the codec's shapes it must stay rare."""
    for shape in REAL.values():
        ops.rvq_search_stats(reset=True)
        make(**shape).search()
        stats = ops.rvq_search_stats()
        assert stats.redone <= stats.codes // 50, shape


def test_float64_weights_count_as_float32() -> None:
    q = make(channels=64)
    weights: dict[str, Tensor] = {k: v.double() * (1 + 1e-9) for k, v in q.weights.items()}
    assert torch.equal(ops.rvq_search(q.z, **weights)[0], q.search()[0])


def test_stats_refuse_what_is_no_bool() -> None:
    with pytest.raises(ValueError, match="reset must be True or False, got 'x'"):
        ops.rvq_search_stats(reset="x")  # type: ignore[arg-type]
