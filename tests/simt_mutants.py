"""Planted bugs: a copy of the kernels with one place changed, and whether the emulator sees it.

A mutant replaces exactly one occurrence of a string in one file, so that a test notices when the line that it breaks is
no longer there. `build` compiles the mutants of an op, two at a time; `caught_by` runs cases under several seeds and
tells what was seen first, or None where nothing was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import simt_cases
from torch import Tensor

Tensors = Mapping[str, Tensor | int | None]
JOBS = 2
SEEDS = (1, 2, 3)
# A quarter of the time to compile; and a planted bug may leave a variable unused.
FLAGS = ("-std=c++20", "-O0", "-g1", "-fsanitize=address", "-Wno-unknown-pragmas")


class Mutant(NamedTuple):
    """`old`, which stands once in kernels/`file`, becomes `new`; with both the same, the mutant is a control."""

    file: str
    old: str
    new: str


def plant(mutant: Mutant, root: Path) -> None:
    """Copy kernels/ and tests/simt/ to root and change the copy; ValueError unless `old` is there exactly once."""
    text = (simt_cases.ROOT / "kernels" / mutant.file).read_text()
    if (count := text.count(mutant.old)) != 1:
        raise ValueError(f"kernels/{mutant.file} must hold {mutant.old!r} once, got {count} times")
    simt_cases.copy_sources(root)
    (root / "kernels" / mutant.file).write_text(text.replace(mutant.old, mutant.new))


def build(op: str, mutants: Mapping[str, Mutant], folder: Path) -> dict[str, Path]:
    """The program of each mutant, by its name."""
    simt_cases.program(op)  # the emulator's own objects, which all share

    def make(name: str) -> Path:
        root = folder / "".join(c if c.isalnum() else "_" for c in name)
        plant(mutants[name], root)
        return simt_cases.build(op, root / "build", root, FLAGS)

    with ThreadPoolExecutor(JOBS) as pool:
        return dict(zip(mutants, pool.map(make, mutants), strict=True))


def outputs(program: Path, folder: Path, cases: Sequence[Tensors], seed: int = 1) -> list[dict[str, Tensor]]:
    """What a program makes of the cases."""
    return simt_cases.run(program, folder, cases, seed, note=False)[0]


def caught_by(
    program: Path,
    folder: Path,
    cases: Sequence[Tensors],
    expected: Sequence[Mapping[str, Tensor]],
    seeds: Sequence[int] = SEEDS,
) -> str | None:
    """Tell how the program gives itself away: it stops, or an output differs from `expected` in a bit; else None."""
    for seed in seeds:
        for i, (case, wanted) in enumerate(zip(cases, expected, strict=True)):
            try:
                (made,) = outputs(program, folder, [case], seed)
            except simt_cases.Failed as error:
                return f"stopped: {_first_line(str(error))}"
            for name, value in wanted.items():
                if not simt_cases.same_bits(made[name], value):
                    return f"differs: {name} of case {i}, seed {seed}"
    return None


def _first_line(report: str) -> str:
    telling = [line for line in report.splitlines() if "ERROR" in line or "runtime error" in line or "simt:" in line]
    return (telling or report.splitlines() or ["no report"])[0]
