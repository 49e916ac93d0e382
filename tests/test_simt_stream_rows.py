"""The CUDA kernel that brings a stream's contexts in and takes them back, on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import simt_cases
import torch
from simt_inputs import NO_ERROR, SimtCase, stream_rows_case

OP = "stream_rows"
pytestmark = pytest.mark.usefixtures("one_thread")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
WHOLE = [(8, 0, 16), (24, 400, 4320), (5000, 4800, 8), (5400, 16, 600)]


def check(folder: Path, case: SimtCase, vectors: bool = True) -> int:
    """Compares every element, and returns what the error's cell holds."""
    (made,), names = simt_cases.run(simt_cases.program(OP), folder, [case.tensors])
    assert simt_cases.same_bits(made["y"], case.expected)
    assert len(names) == 1 and all(("Vector16" in name) == vectors for name in names)
    return int(made["error"])


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_runs_of_every_row(dtype: torch.dtype, tmp_path: Path) -> None:
    assert check(tmp_path, stream_rows_case(WHOLE, dtype=dtype)) == NO_ERROR, "a launch of all rows clears the error"


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(
    "runs, more",
    [
        ([(3, 5, 1), (11, 0, 777)], {}),
        ([(8, 0, 13)], {}),
        (WHOLE[:3], {"width": 5801}),
        (WHOLE[:3], {"shift": 1}),
    ],
    ids=["anywhere", "a tail", "rows", "memory"],
)
def test_what_does_not_lie_on_16_bytes(
    dtype: torch.dtype, runs: list[tuple[int, int, int]], more: dict[str, int], tmp_path: Path
) -> None:
    check(tmp_path, stream_rows_case(runs, dtype=dtype, **more), vectors=False)


@pytest.mark.parametrize("kept", [[1, 1, 1], [0, 1, 0], [0, 0, 0]], ids=str)
def test_kept_rows_alone(kept: list[int], tmp_path: Path) -> None:
    assert check(tmp_path, stream_rows_case(WHOLE, kept, NO_ERROR)) == NO_ERROR
    assert check(tmp_path, stream_rows_case(WHOLE, kept, 7)) == 7, "a code out of range changes no slot"
    check(tmp_path, stream_rows_case(WHOLE, kept, 7, tells=0))


def test_as_many_runs_as_a_launch_takes(tmp_path: Path) -> None:
    check(tmp_path, stream_rows_case([(i * 56, (95 - i) * 48, 8 + i % 5 * 8) for i in range(96)]))


def test_no_slots(tmp_path: Path) -> None:
    case = stream_rows_case(WHOLE, batch=0)
    (made,), names = simt_cases.run(simt_cases.program(OP), tmp_path, [case.tensors])
    assert made["y"].shape == (0, 6000) and names == set()
