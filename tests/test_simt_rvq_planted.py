"""Bugs planted in the CUDA kernels of rvq_search and rvq_lookup, which their cases on the CPU must show."""

from __future__ import annotations

from pathlib import Path

import pytest
import simt_cases as simt
import simt_mutants
import torch
from test_simt_rvq import TILE_EACH, Case, Result, clustered, lookup_case, same, tied

pytestmark = pytest.mark.skipif(bool(simt.missing()), reason=simt.missing() or "it can run")


def unplanted(op: str, tmp_path: Path, case: Case) -> Result:
    """The result of an op's program as it is."""
    (result,), _ = simt.run(simt.program(op), tmp_path, [case], 1)
    return result


def planted(op: str, tmp_path: Path, file: str, old: str, new: str) -> Path:
    """Build the program of an op from kernels with one string replaced."""
    root = simt.copy_sources(tmp_path / "sources")
    path = root / "kernels" / file
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    return simt.build(op, root / "build", root, simt_mutants.FLAGS)


def caught(program: Path, tmp_path: Path, case: Case, right: Result) -> bool:
    """Whether the emulator or a sanitizer stops it, or its result differs, in one of a few orders of threads."""
    for seed in range(1, 6):
        try:
            (got,), _ = simt.run(program, tmp_path, [case], seed)
        except simt.Failed:
            return True
        if not same(got, right):
            return True
    return False


@pytest.mark.parametrize(("op", "frames"), [("rvq_search", 18), ("rvq_lookup", 30), ("rvq_lookup", 8)])
def test_nothing_planted_is_not_caught(op: str, frames: int, tmp_path: Path) -> None:
    case = tied(8, 37).case(margins=1) if op == "rvq_search" else lookup_case(frames=frames)[0]
    if op == "rvq_lookup":
        case["codes"][0, 0, 0] = 2**30
    right = unplanted(op, tmp_path, case)
    assert not caught(planted(op, tmp_path, f"{op}/{op}.cuh", "#pragma once", "#pragma once"), tmp_path, case, right)


COARSE = "rvq_search/rvq_search_coarse.cuh"
SEARCH, LOOKUP, DEVICE = "rvq_search/rvq_search.cuh", "rvq_lookup/rvq_lookup.cuh", "rvq_search/rvq_device.cuh"


@pytest.mark.parametrize(
    "old, new, period",
    [
        ("normalise(p, s, stage);\n      sync_threads();", "normalise(p, s, stage);", 37),
        ("b.group < a.group", "b.group > a.group", 37),
        ("smallest < best.score[f];", "smallest <= best.score[f];", 1024),
    ],
    ids=["missing barrier", "wrong tie between threads", "wrong tie in a thread"],
)
def test_planted_bugs_of_the_search_are_caught(old: str, new: str, period: int, tmp_path: Path) -> None:
    case = tied(8, period).case(margins=1)
    right = unplanted("rvq_search", tmp_path, case)
    assert caught(planted("rvq_search", tmp_path, SEARCH, old, new), tmp_path, case, right)


@pytest.mark.parametrize(
    "old, new",
    [
        ("- s.slack[f];", "- minimum(s.slack[f], 0);"),
        ("s.slack[f] = !asked ?", "s.slack[f] = false ?"),
        ("advance(params, s, stage);\n      sync_threads();", "advance(params, s, stage);"),
        ("search(params, s, ahead, best);\n      sync_threads();", "search(params, s, ahead, best);"),
        ("choose(params, s, stage, best);\n      sync_threads();", "choose(params, s, stage, best);"),
        ("finish(params, s, stage - 1, f);\n      sync_warp();", "finish(params, s, stage - 1, f);"),
        ("bits_of(score + 0.0f)", "bits_of(score * 0.0f)"),
        ("pass = thread_index() / kWarp;\n        ++stage;", "++stage;"),
        ("slots = shuffle(own, owner);", "slots = shuffle(own, owner) & 0xffu;"),
        ("ceil_div(p.batch * p.frames, RvqSearchCoarse", "1 + 0 * ceil_div(p.batch * p.frames, RvqSearchCoarse"),
    ],
    ids=[
        "no slack",
        "a broken frame that is asked for",
        "missing barrier: queries",
        "missing barrier: sums",
        "missing barrier: winners",
        "missing barrier in a warp",
        "the index alone",
        "the second stage's bytes from where the first one's end",
        "eights left out",
        "dropped tail",
    ],
)
def test_planted_bugs_of_the_coarse_search_are_caught(old: str, new: str, tmp_path: Path) -> None:
    q = clustered(0.02, frames=20, stages=2)
    q.z[0, 3, 5] = torch.nan
    case = q.case(sums=1, **TILE_EACH)
    right = unplanted("rvq_search", tmp_path, case)
    assert caught(planted("rvq_search", tmp_path, COARSE, old, new), tmp_path, case, right)


@pytest.mark.parametrize(
    "file, old, new, frames",
    [
        (LOOKUP, "rows);\n    sync_threads();", "rows);", 30),
        (LOOKUP, "ceil_div(p.batch * p.frames, kFrames)", "(p.batch * p.frames / kFrames)", 30),
        (LOOKUP, "entries);\n    sync_threads();", "entries);", 30),
        (LOOKUP, "        entry = 0;\n        atomic_add(&tile", "        atomic_add(&tile", 30),
        (DEVICE, "cell >= count * kFrames", "cell > count * kFrames", 30),
        (LOOKUP, "    sync_threads();\n    if (!there) return;", "    if (!there) return;", 8),
        (LOOKUP, "        entry = 0;\n        atomic_add(&broken", "        atomic_add(&broken", 8),
        (LOOKUP, "    if (thread_index() == 0) broken = 0;\n", "", 8),
        (LOOKUP, "    if (!there) return;\n", "", 8),
        (LOOKUP, "    if (adds) sum += more;\n", "", 8),
    ],
    ids=[
        "missing barrier",
        "dropped tail",
        "missing barrier: codes",
        "out of bounds: a code",
        "out of bounds: one more",
        "frames alone, missing barrier",
        "frames alone, out of bounds: a code",
        "frames alone, a flag that starts as it is",
        "frames alone, out of bounds: a column",
        "frames alone, no addend",
    ],
)
def test_planted_bugs_of_the_lookup_are_caught(file: str, old: str, new: str, frames: int, tmp_path: Path) -> None:
    case, _ = lookup_case(frames=frames)
    case["codes"][0, 0, 0] = 2**30
    right = unplanted("rvq_lookup", tmp_path, case)
    assert caught(planted("rvq_lookup", tmp_path, file, old, new), tmp_path, case, right)
