"""The CUDA kernel that brings codes to where a recording reads them, on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import simt_cases
import torch
from simt_inputs import SimtCase, take_codes_case

OP = "take_codes"
pytestmark = pytest.mark.usefixtures("one_thread")


def told(folder: Path, case: SimtCase) -> bool:
    """Compares every code and what lies beside them, and returns whether one was said to be out of range."""
    (made,), names = simt_cases.run(simt_cases.program(OP), folder, [case.tensors])
    assert torch.equal(made["y"], case.expected) and len(names) == 1
    return bool(int(made["wrong"]))


@pytest.mark.parametrize(
    "shape",
    [(3, (1, 7), 21, 24), (1, (1, 7), 1, 1), (32, (1, 7), 1, 1), (2, (1, 7), 125, 128), (4, (1,), 100, 128)],
    ids=str,
)
@pytest.mark.parametrize("frames_first", [False, True], ids=["as they are", "frames first"])
def test_codes_in_range(shape: tuple[int, tuple[int, ...], int, int], frames_first: bool, tmp_path: Path) -> None:
    assert not told(tmp_path, take_codes_case(*shape, frames_first=frames_first))


@pytest.mark.parametrize("place", [(0, 0, 0, 0), (0, 2, 0, 20), (1, 0, 0, 0), (1, 2, 6, 20), (1, 1, 3, 7)], ids=str)
def test_a_code_out_of_range(place: tuple[int, int, int, int], tmp_path: Path) -> None:
    entries = (16384, 4096)[place[0]]
    for value in (-1, entries, -(2**62), 2**62, 2**32):
        assert told(tmp_path, take_codes_case(wrong=place, value=value)), value
    for value in (0, entries - 1):
        assert not told(tmp_path, take_codes_case(wrong=place, value=value)), value


def test_no_frames_and_no_clips(tmp_path: Path) -> None:
    for case in (take_codes_case(frames=0), take_codes_case(batch=0)):
        (made,), names = simt_cases.run(simt_cases.program(OP), tmp_path, [case.tensors])
        assert torch.equal(made["y"], case.expected)
        assert not names and not int(made["wrong"])
