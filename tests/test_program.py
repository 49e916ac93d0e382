"""The program of launches and copies that a stream's step is, and where packed weights lie."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dualcodec_ext import build
from dualcodec_ext.ops import packing


def new() -> Any:
    module = build.load_module()
    assert module is not None
    return module.Program()


def convolve(x: Tensor, weight: Tensor, out: Tensor) -> None:
    torch.ops.dualcodec_ext.snake_conv1d.out(
        x, weight, None, None, 1, 1, (0, 0), "none", None, None, packing.pack_conv1d(weight), out=out
    )


def test_what_is_recorded_runs_later_and_again() -> None:
    x, weight = torch.randn(1, 20, 3), torch.randn(40, 20, 1)
    out = torch.full((1, 40, 3), torch.nan)
    program = new()
    program.record(lambda: convolve(x, weight, out))
    assert out.isnan().all(), "recording runs nothing"
    expected = torch.empty_like(out)
    for _ in range(2):
        program.run([])
        convolve(x, weight, expected)
        assert torch.equal(out, expected)
        x.copy_(torch.randn_like(x))
    convolve(x, weight, expected)  # behind a recording calls run at once
    assert not torch.equal(out, expected)


def test_a_program_keeps_what_it_needs() -> None:
    """The packed weight, and a bias that is padded in the call, are the program's alone."""
    x, out, program = torch.randn(1, 20, 3), torch.empty(1, 40, 3), new()
    expected = torch.empty_like(out)

    def record(weight: Tensor) -> None:
        program.record(lambda: convolve(x, weight, out))
        convolve(x, weight, expected)

    record(torch.randn(40, 20, 1))
    torch.full((100_000,), torch.nan)  # what had been let go of would be written over
    program.run([])
    assert torch.equal(out, expected)


def test_copies_go_by_the_slots_of_the_run() -> None:
    state, rows, program = torch.arange(20.0).reshape(5, 4), torch.zeros(2, 3), new()
    program.keep(state[:, 1:], rows, False)
    program.zero(state[0])
    program.add(rows, torch.ones(2, 3))
    program.keep(state[:, 1:], rows, True)
    before = state.clone()
    program.run([4, 2])
    before[0] = 0
    before[[4, 2], 1:] += 1
    assert torch.equal(state, before) and torch.equal(rows, before[[4, 2], 1:])


def test_errors() -> None:
    program = new()
    with pytest.raises(
        RuntimeError, match=r"Program.record: the call must launch a kernel of the CPU, it launched none"
    ):
        program.record(lambda: None)
    state, rows = torch.zeros(3, 4), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"Program.keep: rows must be as the state's"):
        program.keep(state, rows[:, :3], False)
    with pytest.raises(ValueError, match=r"Program.keep: rows must be 2-dimensional"):
        program.keep(state, torch.zeros(4, 2).t(), False)
    program.keep(state, rows, True)
    with pytest.raises(ValueError, match=r"Program.run: slots must be 2, got 1"):
        program.run([0])
    with pytest.raises(IndexError, match=r"Program.run: slot 3 is none"):
        program.run([0, 3])


def test_a_call_that_fails_ends_the_recording() -> None:
    program, x, out = new(), torch.randn(1, 20, 3), torch.full((1, 40, 3), torch.nan)
    with pytest.raises(ValueError, match=r"snake_conv1d: weight must be"):
        program.record(lambda: convolve(x, torch.zeros(40, 19, 1), out))
    convolve(x, torch.randn(40, 20, 1), out)
    assert not out.isnan().any()


@pytest.mark.skipif(sys.platform != "linux", reason="pages are asked for on Linux alone")
def test_wide_weights_begin_with_a_huge_page() -> None:
    wide, narrow = torch.randn(768, 768, 7), torch.randn(48, 48, 7)
    packed = packing.pack_conv1d(wide)
    assert packed.data_ptr() % (2 << 20) == 0 and packed.numel() == wide.numel()
    assert packing.pack_conv1d(narrow).numel() == narrow.numel()
    lines = Path("/proc/self/smaps").read_text(encoding="ascii").splitlines()
    inside, flags = False, ""
    for line in lines:
        if found := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            low, high = (int(part, 16) for part in found.groups())
            inside = low <= packed.data_ptr() < high
        elif inside and line.startswith("VmFlags"):
            flags = line
    assert " hg" in flags, "no huge pages were asked for"
