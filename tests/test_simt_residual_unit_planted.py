"""Bugs planted in residual_unit's CUDA kernels, which their cases on the CPU must show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import simt_cases
import simt_mutants
from simt_cases import ROOT
from simt_units import case, check
from torch import Tensor

pytestmark = pytest.mark.skipif(bool(simt_cases.missing()), reason=simt_cases.missing() or "it can run")

# What is replaced in the kernel, and what then has to be seen: a report, or another output.
PLANTED = {
    "no barrier before the taps": (
        "      cp_async_wait<kStages - 2>();\n      sync_threads();\n      issue(step + kStages - 1);\n"
        "      Tile::template step<kStep>(sums, rows + step / kChunks * tap_offset",
        "      cp_async_wait<kStages - 2>();\n      issue(step + kStages - 1);\n"
        "      Tile::template step<kStep>(sums, rows + step / kChunks * tap_offset",
    ),
    "no barrier before the hidden values": ("    sync_threads();  // the input's memory is free\n", ""),
    "no barrier after the residual": ("    sync_threads();  // the residual is everyone's\n", ""),
    "a wrong tap": ("rows + step / kChunks * tap_offset", "rows + (step + 1) / kChunks * tap_offset"),
    "a dropped tail": (
        "    if (begin >= out_valid) {",
        "    if (begin + kRows > p.out_steps) return;\n    if (begin >= out_valid) {",
    ),
    "a read outside x": ("t >= 0 && t < valid && channel < p.channels;", "t >= 0 && channel < p.channels;"),
    "a write outside y": ("if (t >= p.out_steps || channel >= p.channels) continue;", ""),
    "a tile too small": ("(segment(dilation) + kStages * kStep)", "(segment(dilation) + kStages * kStep - 16)"),
}


# The same of the kernels on warpgroup products: case 0 has weights that stay, 1 weights that stream, 2 teams.
GROUPS_PLANTED = {
    "no barrier before the taps": (
        "        fence_async();\n        sync_threads();\n        wgmma_fence();\n        Parts::template multiply<",
        "        fence_async();\n        wgmma_fence();\n        Parts::template multiply<",
    ),
    "no barrier before a step": (
        "      sync_threads();\n      wgmma_fence();\n      products(",
        "      wgmma_fence();\n      products(",
    ),
    "no wait for a stage's products": ("      wgmma_wait<1>();\n", ""),
    "no wait for a stage's weights": ("cp_async_wait<kResident ? 0 : kStages - 3>()", "cp_async_wait<kStages>()"),
    "no wait for the sums": (
        "      wgmma_wait<0>();\n      settle(sums);\n      sync_threads();  // the rows' memory is free\n",
        "      sync_threads();\n",
    ),
    "no barrier before the next rows": ("      sync_threads();  // the rows' memory is free\n", ""),
    "no barrier before the ring is filled again": ("        sync_threads();  // the ring is free\n", ""),
    "no wait for the rows": ("cp_async_wait<kResident ? 0 : kStages - 2>()", "cp_async_wait<kStages>()"),
    "the residual a row off": ("own_row() + static_cast<int>(p.residual_shift)", "own_row() + 1"),
    "a residual outside x": ("if (valid && channel < channels) values", "if (channel < channels) values"),
    "the 1x1's columns out of order": ("within % 4 * 4 + within / 4;", "within;"),
    "a wrong tap, weights that stay": (
        "moved(weights, tap * kStageBytes)",
        "moved(weights, (tap - 1) * kStageBytes)",
    ),
    "a wrong tap, weights that stream": (
        "const Panel a = moved(first, tap * dilation",
        "const Panel a = moved(first, (tap - 1) * dilation",
    ),
    "a wrong panel": ("k / 4 * panel_bytes + k % 4 * 32", "k / 5 * panel_bytes + k % 4 * 32"),
    "a dropped tail": ("return clip < p.clips;", "return clip < p.clips && (tile == 0 || tile + 1 < p.row_tiles);"),
    "a tile taken twice": ("over = at >= per_clip ? 1 : 0", "over = at > per_clip ? 1 : 0"),
    "a read outside x": (
        "const bool valid = counts && static_cast<unsigned>(begin + row) < static_cast<unsigned>(at.in_valid);",
        "const bool valid = counts && begin + row >= 0;",
    ),
    "a write outside y": ("if (t + half * 8 < p.out_steps && channel < channels)", "if (channel < channels)"),
    "a tile too small": ("kWeightBytes + kPanels * Parts::seg", "kWeightBytes - 1024 + kPanels * Parts::seg"),
    # Case 2: teams.
    "teams: no barrier before the taps": ("      prepare(next);\n      sync_team();\n", "      prepare(next);\n"),
    "teams: no barrier before the next rows": ("      sync_team();  // the taps have left the rows' memory\n", ""),
    "teams: no wait for the sums": (
        "(p, at, 0, old);\n        wgmma_wait<0>();\n        settle(sums);\n      }\n      sync_team();",
        "(p, at, 0, old);\n      }\n      sync_team();",
    ),
    "teams: a wrong half of a panel": ("shift = team * kHalf", "shift = 0"),
    "teams: a wrong tap": ("shift, 0, weights_of(smem, tap)", "shift, 0, weights_of(smem, tap - 1)"),
    "teams: no rows for the tile behind": ("      fetch(next);\n", "      cp_async_commit();\n"),
    "another channel's Snake on the output": ("+ first * 2 + thread_index() % 4 * 4", "+ first * 2"),
}

# The same of the kernel whose warpgroups share 64 steps.
HALVES_PLANTED = {
    "no barrier before a step": ("        sync_threads();\n        wgmma_fence();\n", "        wgmma_fence();\n"),
    "no barrier between hidden values and the 1x1": (
        "        sync_threads();\n        wgmma_fence();\n",
        "        if (step <= kTaps * kChunks) sync_threads();\n        wgmma_fence();\n",
    ),
    "no wait for a stage's products": ("        wgmma_wait<1>();\n", ""),
    "no wait for a stage's weights": ("cp_async_wait<kStages - 3>()", "cp_async_wait<kStages>()"),
    "no wait for the sums": ("      wgmma_wait<0>();\n      settle(sums);\n", ""),
    "no wait for the 1x1": ("      wgmma_wait<0>();\n      settle(out);\n", ""),
    "no wait for the first rows": ("    cp_async_wait<kStages - 4>();\n", ""),
    "no wait for the next rows": ("cp_async_wait<kChunks - 1>()", "cp_async_wait<kStages>()"),
    "no wait for the rows behind an empty tile": (
        "        cp_async_wait<0>();\n        continue;",
        "        continue;",
    ),
    "no barrier before the next rows": ("      settle(sums);\n", "      settle(sums);\n      fetch(turn);\n"),
    "no rows for the tile behind": ("          if (panel == 0) fetch(turn);", ""),
    "no weights for the tile behind": ("if (turn.there(p)) load_weights(p, own, ahead - kSteps, to);", ""),
    "a panel without Snake": ("if (step < kChunks) snake_rows(", "if (step + 1 < kChunks) snake_rows("),
    "a wrong half of a stage's panel": ("(2 - half) * kStepPanel + half * kHalfRow", "(2 - half) * kStepPanel"),
    "a wrong half of the hidden values": ("((half * 4 + n) ^ row % 8)", "(n ^ row % 8)"),
    "another half's vectors": ("(panel * 8 + half * 4) * 32", "(panel * 8) * 32"),
    "another half's residual": ("p, at, panel * 64 + half * 32, words", "p, at, panel * 64, words"),
    "a wrong tap": ("tap = moved(tap, dilation * kPanelRowBytes)", "tap = moved(tap, kPanelRowBytes)"),
    "the 1x1's columns out of order": ("(panel < 2 ? panel : half) * 4 + lane % 4", "panel * 4 % 8 + lane % 4"),
    "a read outside x": (
        "const bool there = static_cast<unsigned>(begin + row) < static_cast<unsigned>(at.in_valid);",
        "const bool there = begin + row >= 0;",
    ),
    "weights past their end": ("wide && within + k < deep;\n        cp_async4(", "wide;\n        cp_async4("),
    "an empty tile's rows left": ("first += kPanelColumns)", "first += 2 * kPanelColumns)"),
    "a tile too small": ("kWeightBytes + kHiddenBytes + kPanels", "kWeightBytes + kHiddenBytes - 1024 + kPanels"),
}


def build_planted(op: str, files: tuple[str, ...], bugs: dict[str, tuple[str, str]], folder: Path) -> dict[str, Path]:
    """A program per planted bug, each in the one of files that has its text, and one without ("none")."""
    texts = {file: (ROOT / "kernels/residual_unit" / file).read_text() for file in files}
    mutants = {}
    for name, (old, new) in bugs.items():
        found = [file for file, text in texts.items() if old in text]
        assert len(found) == 1, f"{name}: {found} have its text"
        mutants[name] = simt_mutants.Mutant(f"residual_unit/{found[0]}", old, new)
    return {"none": simt_cases.program(op), **simt_mutants.build(op, mutants, folder)}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build_planted("residual_unit_one", ("residual_unit.cuh",), PLANTED, tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def groups_planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("groups_planted")
    files = ("wgmma_parts.cuh", "residual_unit_wgmma.cuh", "residual_unit_teams.cuh")
    return build_planted("residual_unit_groups", files, GROUPS_PLANTED, folder)


@pytest.fixture(scope="module")
def halves_planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("halves_planted")
    return build_planted("residual_unit_halves", ("residual_unit_halves.cuh",), HALVES_PLANTED, folder)


def seen(program: Path, folder: Path, *cases: tuple[dict[str, Any], Tensor]) -> bool:
    """Whether some order of threads shows a bug: a report, or an output that differs from the reference."""
    for seed in (1, 2, 3):
        for tensors, expected in cases:
            try:
                check(program, folder, tensors, expected, seed)
            except (simt_cases.Failed, AssertionError):
                return True
    return False


@pytest.mark.parametrize("name", PLANTED)
def test_planted(planted: dict[str, Path], tmp_path: Path, name: str) -> None:
    assert seen(planted[name], tmp_path, case(steps=67, dilation=3))


def test_nothing_planted(planted: dict[str, Path], tmp_path: Path) -> None:
    assert not seen(planted["none"], tmp_path, case(steps=67, dilation=3))


def group_cases() -> list[tuple[dict[str, Any], Tensor]]:
    return [
        case(steps=67, dilation=3, out_alpha=True),
        case(96, 300, dilation=3, multiprocessors=1),
        case(72, 300, 2, dilation=3),
    ]


@pytest.mark.parametrize("name", GROUPS_PLANTED)
def test_groups_planted(groups_planted: dict[str, Path], tmp_path: Path, name: str) -> None:
    assert seen(groups_planted[name], tmp_path, *group_cases())


def test_nothing_planted_in_groups(groups_planted: dict[str, Path], tmp_path: Path) -> None:
    assert not seen(groups_planted["none"], tmp_path, *group_cases())


def halves_cases() -> list[tuple[dict[str, Any], Tensor]]:
    return [
        case(192, 67, dilation=3, out_alpha=True),
        case(136, 130, 3, dilation=3, lengths=[130, 0, 70], multiprocessors=1),
    ]


@pytest.mark.parametrize("name", HALVES_PLANTED)
def test_halves_planted(halves_planted: dict[str, Path], tmp_path: Path, name: str) -> None:
    assert seen(halves_planted[name], tmp_path, *halves_cases())


def test_nothing_planted_in_halves(halves_planted: dict[str, Path], tmp_path: Path) -> None:
    assert not seen(halves_planted["none"], tmp_path, *halves_cases())
