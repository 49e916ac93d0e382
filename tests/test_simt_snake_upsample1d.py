"""snake_upsample1d's CUDA kernels on the CPU, against the float64 reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import simt_cases
import torch
from simt_inputs import SimtCase, run_one, same_bits, steps_first, upsample_case, worst
from simt_units import case as unit_case
from tolerances import TOLERANCE

from dualcodec_ext._stream_rows import later
from dualcodec_ext.reference.ops import snake
from dualcodec_ext.steps import UpsampleStep

OP = "snake_upsample1d"
pytestmark = pytest.mark.usefixtures("one_thread")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# multiprocessors=1 takes the large tiles, 1000 the small ones, and a block per range of the reduction.
CASES: dict[str, dict[str, Any]] = {
    "96 -> 48, S=4, a full tile and a tail": {"shape": (96, 48, 4), "steps": 140},
    "192 -> 96, S=5": {"shape": (192, 96, 5), "steps": 12, "padding": (3, 3)},
    "384 -> 192, S=6, small tiles": {"shape": (384, 192, 6), "steps": 3, "padding": (3, 3), "multiprocessors": 1000},
    "1536 -> 16, S=2, ranges": {"shape": (1536, 16, 2), "steps": 3, "padding": (1, 1), "multiprocessors": 1000},
    "384 -> 192, S=6, warpgroups": {
        "shape": (384, 192, 6),
        "steps": 140,
        "padding": (3, 3),
        "shared_bytes": 227 << 10,
    },
    "96 -> 48, S=4, warpgroups, lengths": {
        "shape": (96, 48, 4),
        "steps": 150,
        "batch": 2,
        "lengths": [150, 31],
        "shared_bytes": 227 << 10,
    },
    "64 -> 130, S=2": {"shape": (64, 130, 2), "steps": 130, "padding": (1, 1), "dtype": F16},
    "repeat, causal": {"shape": (96, 48, 4), "mode": "repeat", "padding": (7, 0), "steps": 20},
    "repeat, look-ahead": {"shape": (96, 48, 5), "mode": "repeat", "padding": (3, 6), "steps": 20, "dtype": F16},
    "repeat, float32": {"shape": (48, 40, 6), "mode": "repeat", "padding": (3, 8), "steps": 20, "dtype": F32},
    "repeat, S=1": {"shape": (32, 16, 1), "mode": "repeat", "padding": (1, 0), "steps": 9, "dtype": F32},
    "float32": {"shape": (96, 48, 4), "steps": 70, "dtype": F32},
    "one frame, 20 clips": {"shape": (192, 96, 8), "steps": 1, "batch": 20, "padding": (4, 4)},
    "lengths": {"shape": (40, 24, 3), "steps": 21, "batch": 4, "padding": (2, 2), "lengths": [21, 0, 8, 1]},
    "repeat, lengths": {"shape": (40, 24, 3), "mode": "repeat", "padding": (5, 0), "batch": 2, "lengths": [20, 3]},
    "channels first": {"shape": (48, 24, 4), "steps": 13, "batch": 2, "first": True},
    "odd channels": {"shape": (13, 19, 7), "steps": 9, "padding": (4, 4), "dtype": F32, "bias": False},
    "no crop": {"shape": (16, 16, 2), "steps": 5, "padding": (0, 0)},
    "no frames": {"shape": (16, 16, 2), "steps": 0, "padding": (1, 1)},
}


def made(
    shape: tuple[int, int, int], mode: str = "transposed", padding: tuple[int, int] = (2, 2), **options: Any
) -> Any:
    return upsample_case(*shape, mode, padding, **options)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_parity(options: dict[str, Any], tmp_path: Path) -> None:
    case = made(**options)
    y, _ = run_one(OP, tmp_path, case)
    # Half precision: outputs of 4 to 8 are rounded to 2^-6 (bfloat16) and 2^-9, the reference as they are.
    assert y.shape == case.expected.shape and worst(y, case.expected) <= TOLERANCE[OP, y.dtype]


@pytest.mark.parametrize("mode, padding", [("transposed", (2, 2)), ("repeat", (7, 0))])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_bits_depend_neither_on_tiles_nor_threads(
    mode: str, padding: tuple[int, int], dtype: torch.dtype, tmp_path: Path
) -> None:
    case = made((288, 48, 4), mode, padding, steps=18, dtype=dtype, shared_bytes=227 << 10)
    whole, _ = run_one(OP, tmp_path, case)
    for device in (1, 1000):
        for seed in (2, 3):
            again, _ = run_one(OP, tmp_path, case.with_(multiprocessors=device), seed)
            assert same_bits(whole, again)


@pytest.mark.parametrize("mode, padding", [("transposed", (2, 2)), ("repeat", (7, 0)), ("repeat", (2, 5))])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_stretch_has_the_bits_of_the_whole(
    mode: str, padding: tuple[int, int], dtype: torch.dtype, tmp_path: Path
) -> None:
    case = made((96, 48, 4), mode, padding, steps=20, batch=2, dtype=dtype, shared_bytes=227 << 10)
    whole, _ = run_one(OP, tmp_path, case)
    for first, count in ((0, 7), (4, 76), (8, 33), (76, 1)):
        y, _ = run_one(OP, tmp_path, case.with_(first=first, count=count))
        assert same_bits(y, whole[:, first : first + count].contiguous())


@pytest.mark.parametrize("stride, padding", [(4, (2, 2)), (5, (3, 3))])
def test_a_stretch_from_any_row_with_phases_in_another_order(
    stride: int, padding: tuple[int, int], tmp_path: Path
) -> None:
    case = made((96, 48, stride), "transposed", padding, steps=20)
    whole, _ = run_one(OP, tmp_path, case)
    weight = case.tensors["weight"]
    assert isinstance(weight, torch.Tensor)
    step = UpsampleStep(weight[0], weight[0], weight.flatten(), None, stride, "transposed", padding)
    for rows in range(1, stride):
        moved = later(step, rows)
        more = {"weight": moved.packed.view_as(weight), "left": moved.padding[0], "count": 31}
        for first in (0, stride):
            y, _ = run_one(OP, tmp_path, case.with_(**more, first=first))
            assert same_bits(y, whole[:, rows + first : rows + first + 31].contiguous())


FEW: dict[str, dict[str, Any]] = {
    "384 -> 40, S=6": {"shape": (384, 40, 6), "padding": (3, 3), "steps": 16},
    "768 -> 24, S=8": {"shape": (768, 24, 8), "padding": (4, 4), "steps": 2},
    "1536 -> 16, S=2": {"shape": (1536, 16, 2), "padding": (1, 1), "steps": 1, "dtype": F16},
    "repeat, phases of other taps, lengths": {
        "shape": (192, 24, 5),
        "mode": "repeat",
        "padding": (3, 6),
        "steps": 9,
        "batch": 3,
        "lengths": [9, 3, 0],
    },
    "odd columns": {"shape": (40, 19, 3), "steps": 9, "batch": 3, "lengths": [9, 3, 0]},
}


@pytest.mark.parametrize("options", FEW.values(), ids=FEW.keys())
def test_few_rows(options: dict[str, Any], tmp_path: Path) -> None:
    """Right, and bit for bit what warpgroup products give, which take x where its channels are not side by side."""
    case = made(**options, shared_bytes=227 << 10)
    y, names = run_one(OP, tmp_path, case)
    assert ["ConvFew" in name for name in names] == [True]
    assert worst(y, case.expected) <= TOLERANCE[OP, y.dtype]
    other, names = run_one(OP, tmp_path, made(**options, first=True, shared_bytes=227 << 10))
    assert any("ConvWgmma" in name for name in names) and same_bits(y, other)


# By the kernel's channels; multiprocessors are blocks.
RESIDENT: dict[str, tuple[int, dict[str, Any]]] = {
    "96 -> 48, S=4": (96, {"shape": (96, 48, 4), "steps": 330, "batch": 2}),
    "96 -> 48, S=4, lengths": (
        96,
        {"shape": (96, 48, 4), "steps": 193, "batch": 5, "lengths": [193, 64, 0, 65, 100], "multiprocessors": 2},
    ),
    "72 -> 40, S=5, a block of one unit": (
        96,
        {"shape": (72, 40, 5), "padding": (2, 3), "steps": 200, "batch": 5, "multiprocessors": 3, "dtype": F16},
    ),
    "96 -> 48, S=5, another crop": (
        96,
        {"shape": (96, 48, 5), "padding": (6, 1), "steps": 320, "batch": 5, "multiprocessors": 4},
    ),
    "192 -> 96, S=5": (
        192,
        {"shape": (192, 96, 5), "padding": (3, 2), "steps": 130, "batch": 5, "multiprocessors": 6},
    ),
    "160 -> 72, S=3, tails of columns": (
        192,
        {
            "shape": (160, 72, 3),
            "padding": (1, 2),
            "steps": 150,
            "batch": 5,
            "lengths": [150, 1, 0, 128, 129],
            "bias": False,
            "multiprocessors": 3,
            "dtype": F16,
        },
    ),
    "384 -> 96, S=2": (384, {"shape": (384, 96, 2), "padding": (1, 1), "steps": 200, "batch": 2, "multiprocessors": 2}),
    "320 -> 48, S=3": (
        384,
        {"shape": (320, 48, 3), "padding": (1, 2), "steps": 150, "batch": 3, "multiprocessors": 3, "dtype": F16},
    ),
}


@pytest.mark.parametrize("channels, options", RESIDENT.values(), ids=RESIDENT.keys())
@pytest.mark.parametrize("snake", [True, False], ids=["Snake", "x as it lies"])
def test_weights_that_stay(channels: int, options: dict[str, Any], snake: bool, tmp_path: Path) -> None:
    """Right, and bit for bit what blocks of one tile give, which write y where its channels are not side by side."""
    case = made(**options, shared_bytes=227 << 10)
    other = made(**options, first=True, shared_bytes=227 << 10)
    if not snake:
        case, other = case.with_(alpha=None), other.with_(alpha=None)
    y, names = run_one(OP, tmp_path, case)
    assert [name for name in names if f", {channels}, " in name and "ConvResident" in name], names
    assert len(names) == 1 + snake
    if snake:
        assert worst(y, case.expected) <= TOLERANCE[OP, y.dtype]
    again, _ = run_one(OP, tmp_path, case, 2)
    assert same_bits(y, again)
    whole, names = run_one(OP, tmp_path, other)
    assert any("ConvWgmma" in name for name in names) and same_bits(y, whole)


# By the kernels that write the pair. The unit behind has so many channels that two kernels compute it.
PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiles and a tail, lengths": (
        "ConvWgmma<",
        {"shape": (64, 200, 2), "padding": (1, 1), "steps": 80, "batch": 2, "lengths": [80, 65]},
    ),
    "ranges": ("ConvWgmma<", {"shape": (512, 200, 2), "padding": (1, 1), "steps": 70, "multiprocessors": 1000}),
    "repeat, lengths": (
        "ConvWgmma<",
        {"shape": (64, 200, 3), "mode": "repeat", "padding": (5, 0), "steps": 50, "batch": 2, "lengths": [50, 7]},
    ),
    "few rows, lengths": (
        "ConvFew<",
        {"shape": (384, 200, 3), "padding": (2, 1), "steps": 9, "batch": 3, "lengths": [9, 0, 4]},
    ),
    "without warpgroup products, lengths": (
        "ConvGemm<",
        {"shape": (64, 200, 2), "padding": (1, 1), "steps": 80, "batch": 2, "lengths": [80, 65], "wgmma": 0},
    ),
    "channels first": ("ConvWgmma<", {"shape": (64, 200, 2), "padding": (1, 1), "steps": 70, "first": True}),
    "odd columns, few rows": ("ConvFew<", {"shape": (40, 203, 3), "padding": (2, 1), "steps": 9, "lengths": [7]}),
    "float32": ("ConvGemm<", {"shape": (48, 40, 4), "steps": 20, "dtype": F32}),
}


def pair_of(case: SimtCase, alpha: torch.Tensor, folder: Path, kernel: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns both results, whose first one has the bits that it has alone."""
    plain, _ = run_one(OP, folder, case)
    (made,), names = simt_cases.run(simt_cases.program(OP), folder, [case.with_(out_alpha=alpha).tensors])
    assert [name for name in names if kernel in name] and not any("ConvResident" in name for name in names)
    y, snaked = steps_first(made["y"], case), steps_first(made["y_snaked"], case)
    assert same_bits(y, plain) and not same_bits(y, snaked)
    expected = snake(y.double().transpose(1, 2), alpha.double()).transpose(1, 2).to(y.dtype)
    torch.testing.assert_close(snaked, expected, rtol=2**-7, atol=1e-5)
    return y, snaked


@pytest.mark.parametrize("kernel, options", PAIRS.values(), ids=PAIRS.keys())
def test_a_pair(kernel: str, options: dict[str, Any], tmp_path: Path) -> None:
    """A residual unit gives the same bits with both as with the first alone, which its own Snake goes through."""
    case = made(**options, **({} if "wgmma" in options else {"shared_bytes": 227 << 10}))
    alpha = torch.linspace(0.2, 3, options["shape"][1])
    y, snaked = (t[-1:, -70:].contiguous() for t in pair_of(case, alpha, tmp_path, kernel))
    tensors, _ = unit_case(y.shape[2], y.shape[1], y.shape[0], dtype=y.dtype, dilation=3)
    tensors |= {"x": y, "alpha1": alpha}
    unit = simt_cases.program("residual_unit")
    (alone, given), _ = simt_cases.run(unit, tmp_path, [tensors, {**tensors, "snaked": snaked}])
    assert same_bits(alone["y"], given["y"]) and alone["y"].isfinite().all()


def test_weights_that_stay_write_no_pair(tmp_path: Path) -> None:
    _, options = RESIDENT["96 -> 48, S=4, lengths"]
    pair_of(made(**options, shared_bytes=227 << 10), torch.linspace(0.2, 3, 48), tmp_path, "ConvWgmma<")


def test_a_clip_is_as_alone(tmp_path: Path) -> None:
    lengths = [9, 3, 0, 7]
    case = made((64, 48, 4), steps=9, batch=4, lengths=lengths)
    x = case.tensors["x"]
    assert isinstance(x, torch.Tensor)
    poisoned = x.clone()
    for item, n in zip(poisoned, lengths, strict=True):
        item[n:] = torch.nan
    y, _ = run_one(OP, tmp_path, case.with_(x=poisoned))
    for i, n in enumerate(lengths):
        alone, _ = run_one(OP, tmp_path, case.with_(x=x[i : i + 1, :n], lengths=None))
        assert same_bits(y[i : i + 1, : alone.shape[1]], alone)
        assert (y[i, alone.shape[1] :] == 0).all()


def test_nan_reaches_what_it_may_and_no_more(tmp_path: Path) -> None:
    for mode, padding in (("transposed", (2, 2)), ("repeat", (7, 0)), ("repeat", (2, 5))):
        case = made((32, 16, 4), mode, padding, steps=9, dtype=F32)
        x = case.tensors["x"]
        assert isinstance(x, torch.Tensor)
        broken = x.clone()
        broken[0, 4, 5] = torch.nan
        y, _ = run_one(OP, tmp_path, case.with_(x=broken))
        steps = torch.arange(y.shape[1])
        if mode == "transposed":  # output n takes frames t with 0 <= n + left - t S < 2 S
            reached = (steps + padding[0] - 16 >= 0) & (steps + padding[0] - 16 < 8)
        else:  # ... taps k with floor((n + k - left) / S) = t
            reached = (steps - padding[0] + 7 >= 16) & (steps - padding[0] <= 19)
        assert torch.equal(y[0].isnan().all(1), reached) and torch.equal(y[0].isnan().any(1), reached)


def test_far_arguments(tmp_path: Path) -> None:
    case = made((16, 16, 2), padding=(1, 1), steps=6, dtype=F32)
    alpha, x = torch.full((16,), 3.7e4), case.tensors["x"]
    assert isinstance(x, torch.Tensor)
    y, _ = run_one(OP, tmp_path, case.with_(alpha=alpha))
    near, _ = run_one(OP, tmp_path, case.with_(alpha=alpha, x=x.clone()))
    assert same_bits(y, near) and y.isfinite().all()
    # x + sin^2 / alpha is x but for 1 / alpha.
    plain = made((16, 16, 2), padding=(1, 1), steps=6, dtype=F32)
    tiny, _ = run_one(OP, tmp_path, plain.with_(alpha=torch.full((16,), 1e30)))
    assert (y - tiny).abs().max() < 1e-3


def test_more_shared_memory_than_there_is(tmp_path: Path) -> None:
    case = made((64, 48, 4), shared_bytes=4096)
    with pytest.raises(simt_cases.Failed, match="needs more shared memory than this GPU has"):
        run_one(OP, tmp_path, case)
