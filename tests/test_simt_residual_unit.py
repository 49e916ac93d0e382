"""residual_unit's CUDA kernels on the CPU: every one that ships, against the reference in float64."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import simt_cases
import torch
from simt_cases import ROOT
from simt_units import bits, case, check, output
from tolerances import BF16, F16, F32, TOLERANCE
from torch import Tensor

from dualcodec_ext.reference.ops import snake

pytestmark = pytest.mark.skipif(bool(simt_cases.missing()), reason=simt_cases.missing() or "it can run")

IDLE = 1000  # so many multiprocessors that short tiles are chosen
WITHOUT: dict[str, Any] = {"wgmma": 0}
# [channels, kColumns, kRows]: all kernels of any GPU; WIDE is what a device of one multiprocessor gets.
SHORT = [(32, 32, 64), (48, 48, 64), (64, 64, 64), (96, 96, 64), (128, 128, 64), (192, 192, 64)]
WIDE = [(32, 32, 256), (48, 48, 256), (64, 64, 128), (96, 96, 128), (128, 128, 128), (192, 192, 128)]

# Those of Hopper's warpgroup products: [channels, kColumns, warpgroups of 64 rows; steps and a device that take them].
GROUPS_LONG = [
    (32, 32, 2, 642, 1),
    (48, 48, 2, 642, 1),
    (64, 64, 2, 300, 1),
    (96, 96, 2, 194, 1),
    (128, 128, 2, 194, 1),
]
GROUPS_LONG += [(192, 192, 3, 190, 1)]
TEAMS = [(96, 96, 2, 700, 1)]
GROUPS_SHORT = [(channels, columns, 1, 67, 4) for channels, columns, _ in SHORT if columns < 192]
HALVES = [(192, 192, 2, 200, 2), (192, 192, 1, 67, 4)]


def kernel(dtype: torch.dtype, columns: int, rows: int) -> str:
    return f"dcx::FusedUnit<dcx::{'bf16' if dtype == BF16 else 'f16'}, {columns}, {rows}, "


def group_kernel(dtype: torch.dtype, columns: int, groups: int) -> str:
    return f"<dcx::{'bf16' if dtype == BF16 else 'f16'}, {columns}, {groups}"


def check_groups(program: Path, folder: Path, tensors: dict[str, Any], expected: Tensor, seed: int = 1) -> set[str]:
    """As check, and the bits are those of the kernel that does without warpgroup products."""
    names = check(program, folder, tensors, expected, seed)
    outputs, _ = simt_cases.run(program, folder, [tensors, {**tensors, "wgmma": 0}], seed)
    assert torch.equal(*(bits(o["y"]) for o in outputs))
    return names


@pytest.fixture(scope="module")
def program() -> Path:
    return simt_cases.program("residual_unit")


def test_every_kernel_has_a_case() -> None:
    files = ("residual_unit_launch.cuh", "residual_unit_groups.cuh")
    text = "".join((ROOT / "kernels/residual_unit" / file).read_text() for file in files)
    kernels = {
        "FusedUnit": SHORT + WIDE,
        "WgmmaUnit": GROUPS_SHORT + GROUPS_LONG,
        "WgmmaTeams": TEAMS,
        "WgmmaHalves": HALVES,
    }
    for name, tiles in kernels.items():
        shipped = {(int(columns), int(rows)) for columns, rows in re.findall(rf"{name}<T, (\d+), (\d+)", text)}
        assert shipped == {tile[1:3] for tile in tiles}


@pytest.mark.parametrize("channels, columns, rows", WIDE, ids=str)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_long(program: Path, tmp_path: Path, dtype: torch.dtype, channels: int, columns: int, rows: int) -> None:
    # A full tile and a tail; of 256 rows a tail so long that short tiles would take longer.
    steps = 330 if rows == 256 else rows + 2
    dilation, causal = (9, False) if dtype == BF16 else (3, True)
    options = case(channels, steps, dilation=dilation, causal=causal, dtype=dtype, **WITHOUT)
    names = check(program, tmp_path, *options)
    assert len(names) == 1 and names.pop().startswith(kernel(dtype, columns, rows))


@pytest.mark.parametrize("channels, columns, rows", SHORT, ids=str)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_short(program: Path, tmp_path: Path, dtype: torch.dtype, channels: int, columns: int, rows: int) -> None:
    dilation, causal = (1, True) if dtype == BF16 else (9, False)
    options = case(channels, rows + 3, dilation=dilation, causal=causal, dtype=dtype, multiprocessors=IDLE, **WITHOUT)
    names = check(program, tmp_path, *options)
    assert len(names) == 1 and names.pop().startswith(kernel(dtype, columns, rows))


@pytest.mark.parametrize(
    "channels, columns, groups, steps, multiprocessors", GROUPS_LONG + TEAMS + HALVES + GROUPS_SHORT, ids=str
)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_groups_kernels(
    program: Path,
    tmp_path: Path,
    dtype: torch.dtype,
    channels: int,
    columns: int,
    groups: int,
    steps: int,
    multiprocessors: int,
) -> None:
    # Whole tiles and a tail; of few channels more tiles than blocks.
    dilation, causal = (9, False) if (dtype == BF16) == (groups > 1) else (3, True)
    options = case(channels, steps, dilation=dilation, causal=causal, dtype=dtype, multiprocessors=multiprocessors)
    names = check_groups(program, tmp_path, *options)
    tile = (channels, columns, groups, steps, multiprocessors)
    name = "WgmmaTeams" if tile in TEAMS else "WgmmaHalves" if tile in HALVES else "WgmmaUnit"
    assert len(names) == 1 and names.pop().startswith(f"dcx::{name}{group_kernel(dtype, columns, groups)}")


GROUPS: dict[str, dict[str, Any]] = {
    "shorter than the reach": {"steps": 5, "dilation": 9},
    "one step": {"steps": 1, "dilation": 3, "causal": True},
    "lengths": {"batch": 5, "steps": 200, "lengths": [200, 129, 65, 1, 0], "dilation": 3},
    "lengths, 96 channels": {"channels": 96, "batch": 4, "steps": 150, "lengths": [3, 0, 150, 128], "dilation": 9},
    "no padding, lengths": {"batch": 3, "padding": (0, 0), "dilation": 2, "lengths": [70, 40, 12]},
    "lopsided padding, lengths": {"batch": 2, "padding": (20, 3), "dilation": 2, "lengths": [70, 8]},
    "8 channels": {"channels": 8},
    "40 channels": {"channels": 40, "dilation": 3},
    "72 channels": {"channels": 72, "causal": True, "dtype": F16},
    "136 channels": {"channels": 136, "steps": 10},
    "no bias": {"bias": False},
    "teams, lengths": {"channels": 72, "batch": 6, "steps": 130, "lengths": [130, 0, 129, 5, 128, 70], "dilation": 3},
    "halves, tiles of 64, lengths": {"channels": 136, "batch": 6, "steps": 64, "lengths": [64, 0, 3, 64, 0, 33]},
    "halves, tiles of 128, lengths": {
        "channels": 192,
        "batch": 4,
        "steps": 128,
        "lengths": [128, 0, 100, 128],
        "dilation": 3,
        "multiprocessors": 2,
    },
}


@pytest.mark.parametrize("options", GROUPS.values(), ids=GROUPS.keys())
def test_groups(program: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    names = check_groups(program, tmp_path, *case(**options))
    assert len(names) == 1 and names.pop().startswith("dcx::Wgmma")


# On a device that the fused unit's tiles would leave idle: two kernels.
FEW: dict[str, dict[str, Any]] = {
    "192 channels, a frame": {"channels": 192, "steps": 96, "dilation": 9, "causal": True},
    "lengths": {"channels": 96, "batch": 3, "steps": 40, "dilation": 3, "lengths": [40, 7, 0]},
    "taps apart": {"channels": 136, "steps": 33, "batch": 2, "dilation": 40, "bias": False},
    "72 channels, lopsided padding": {"channels": 72, "batch": 2, "padding": (3, 20), "lengths": [70, 8]},
    "many clips": {"channels": 32, "steps": 3, "batch": 40, "lengths": [3, 0, 1, 2] * 10, "dilation": 3},
}


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("options", FEW.values(), ids=FEW.keys())
def test_few_rows(program: Path, tmp_path: Path, options: dict[str, Any], dtype: torch.dtype) -> None:
    names = check_groups(program, tmp_path, *case(dtype=dtype, multiprocessors=IDLE, **options))
    assert [name[:13] for name in names] == ["dcx::ConvFew<"]


FUSED: dict[str, dict[str, Any]] = {
    "shorter than the reach": {"steps": 5, "dilation": 9},
    "one step": {"steps": 1, "dilation": 3, "causal": True},
    "lengths": {"batch": 4, "steps": 90, "lengths": [90, 65, 1, 0], "dilation": 3},
    "lengths, channels first": {"batch": 2, "lengths": [70, 33], "channels_first": 1},
    "no padding, lengths": {"batch": 3, "padding": (0, 0), "dilation": 2, "lengths": [70, 40, 12]},
    "lopsided padding, lengths": {"batch": 2, "padding": (20, 3), "dilation": 2, "lengths": [70, 8]},
    "one channel": {"channels": 1},
    "13 channels": {"channels": 13, "dilation": 3, "dtype": F16},
    "40 channels": {"channels": 40, "dilation": 3},
    "50 channels, channels first": {"channels": 50, "channels_first": 1, "dtype": F16, "dilation": 9},
    "72 channels": {"channels": 72, "causal": True},
    "136 channels": {"channels": 136, "steps": 10},
    "no bias": {"bias": False},
    "99 KB": {"channels": 192, "steps": 20, "dilation": 9, "shared_bytes": 99 << 10},
    "64 KB": {"channels": 128, "steps": 20, "dilation": 9, "shared_bytes": 64 << 10, "dtype": F16, "capability": 75},
}


@pytest.mark.parametrize("options", FUSED.values(), ids=FUSED.keys())
def test_one_kernel(program: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    names = check(program, tmp_path, *case(**WITHOUT, **options))
    assert len(names) == 1 and names.pop().startswith("dcx::FusedUnit<")


TWO: dict[str, dict[str, Any]] = {
    "200 channels": {"channels": 200, "steps": 20, "dilation": 3},
    "200 channels, lengths": {"channels": 200, "steps": 30, "batch": 2, "lengths": [30, 7], "multiprocessors": IDLE},
    "256 channels, a frame": {"channels": 256, "steps": 6, "causal": True, "dilation": 9, "dtype": F16},
    "float32": {"channels": 48, "dtype": F32, "dilation": 9},
    "float32, 13 channels": {"channels": 13, "dtype": F32, "channels_first": 1, "causal": True},
    "float32, no padding, lengths": {
        "channels": 20,
        "dtype": F32,
        "batch": 3,
        "padding": (0, 0),
        "dilation": 2,
        "lengths": [70, 40, 12],
    },
    "float32, lopsided padding, lengths": {
        "channels": 20,
        "dtype": F32,
        "batch": 2,
        "padding": (3, 20),
        "lengths": [70, 8],
    },
    "float32, no padding": {"channels": 20, "dtype": F32, "padding": (0, 0), "causal": True},
    "tf32": {"channels": 40, "dtype": F32, "allow_tf32": 1},
    "too far for one tile": {"channels": 32, "steps": 2000, "padding": (9000, 10), "dilation": 1800},
    "192 channels in 64 KB": {"channels": 192, "steps": 5, "dtype": F16, "shared_bytes": 64 << 10, "capability": 75},
}


@pytest.mark.parametrize("options", TWO.values(), ids=TWO.keys())
def test_two_kernels(program: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    names = check(program, tmp_path, *case(**options))
    assert names and all(name.startswith("dcx::Conv") for name in names)


@pytest.mark.parametrize("channels", [32, 48, 72, 96, 128, 192, 200])
@pytest.mark.parametrize("steps", [67, 700])
def test_snake_on_the_output(program: Path, tmp_path: Path, channels: int, steps: int) -> None:
    """Every width's kernels, one after the other's layout: rows of 16 bytes or not, warpgroup products or not."""
    tensors, expected = case(channels, steps, dilation=3, out_alpha=True, multiprocessors=1)
    (check if channels > 192 else check_groups)(program, tmp_path, tensors, expected)
    plain, _ = simt_cases.run(program, tmp_path, [{**tensors, "out_alpha": None}])
    y = plain[0]["y"].double()
    outputs, _ = simt_cases.run(program, tmp_path, [tensors])
    snaked = snake(y.transpose(1, 2), tensors["out_alpha"].double()).transpose(1, 2)
    torch.testing.assert_close(outputs[0]["y"], snaked.to(BF16), rtol=2**-7, atol=1e-5)


# By the kernels that write the pair, and that read it.
PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiles and a tail, lengths": (
        "ConvWgmma<",
        {"channels": 200, "steps": 140, "lengths": [133], "dilation": 9},
    ),
    "ranges in blocks of their own": (
        "ConvWgmma<",
        {"channels": 256, "steps": 70, "multiprocessors": IDLE, "dtype": F16},
    ),
    "clips that share a tile": (
        "ConvWgmma<",
        {"channels": 200, "steps": 9, "batch": 12, "lengths": [9, 0, 1, 5] * 3, "causal": True},
    ),
    "few rows, lengths": ("ConvFew<", {"channels": 200, "steps": 8, "batch": 3, "lengths": [8, 0, 7], "dilation": 3}),
    "few rows in a fused unit's order": (
        "ConvFew<",
        {"channels": 96, "steps": 20, "lengths": [17], "multiprocessors": IDLE},
    ),
    "few rows, ranges": ("ConvFew<", {"channels": 256, "steps": 6, "causal": True, "dilation": 9, "dtype": F16}),
    "without warpgroup products, lengths": (
        "ConvGemm<",
        {"channels": 200, "steps": 20, "batch": 2, "lengths": [20, 13], "dilation": 3, **WITHOUT},
    ),
    "without them, few rows": ("ConvGemm<", {"channels": 200, "steps": 5, "batch": 2, "dtype": F16, "capability": 75}),
    "channels first": (
        "ConvWgmma<",
        {"channels": 200, "steps": 70, "lengths": [66], "channels_first": 1},
    ),
    "channels first, few rows": ("ConvFew<", {"channels": 200, "steps": 10, "lengths": [9], "channels_first": 1}),
    "float32, lengths": ("ConvGemm<", {"channels": 40, "batch": 2, "lengths": [70, 65], "dtype": F32}),
    "tf32": ("ConvGemm<", {"channels": 40, "dtype": F32, "allow_tf32": 1}),
}


@pytest.mark.parametrize("kernel, options", PAIRS.values(), ids=PAIRS.keys())
def test_a_pair(program: Path, tmp_path: Path, kernel: str, options: dict[str, Any]) -> None:
    """Both have the bits that each has alone, and the unit behind gives the same with the pair as with its x alone."""
    tensors, _ = case(**options, out_alpha=True)
    cases = [{**tensors, "pair": 1}, {**tensors, "out_alpha": None}, tensors]
    (pair, plain, snaked), names = simt_cases.run(program, tmp_path, cases)
    assert torch.equal(bits(pair["y"]), bits(plain["y"])) and torch.equal(bits(pair["y_snaked"]), bits(snaked["y"]))
    assert not torch.equal(bits(pair["y"]), bits(pair["y_snaked"]))
    behind = {**tensors, "x": pair["y"], "alpha1": tensors["out_alpha"], "out_alpha": None}
    (alone,), _ = simt_cases.run(program, tmp_path, [behind])
    (given,), reading = simt_cases.run(program, tmp_path, [{**behind, "snaked": pair["y_snaked"]}])
    assert torch.equal(bits(given["y"]), bits(alone["y"])) and given["y"].isfinite().all()
    assert any(kernel in name for name in names) and any(kernel in name for name in reading)
    assert tensors.get("channels_first") or not any("ConvRows" in name for name in reading)


def test_values_are_not_numbers(program: Path, tmp_path: Path) -> None:
    tensors, expected = case(steps=100, dilation=3)
    tensors["x"][0, 50] = torch.nan
    outputs, _ = simt_cases.run(program, tmp_path, [tensors])
    reached = torch.zeros(100, dtype=torch.bool)
    reached[50 - 9 : 50 + 10 : 3] = True
    y = outputs[0]["y"][0].double()
    assert y[reached].isnan().all()
    torch.testing.assert_close(y[~reached], expected[0, ~reached], rtol=0, atol=TOLERANCE["residual_unit", BF16])


def test_far_arguments_of_snake(program: Path, tmp_path: Path) -> None:
    tensors, _ = case(steps=70)
    tensors["alpha1"] = tensors["alpha1"] * 1e5
    tensors["alpha2"] = tensors["alpha2"] * 1e5
    near, _ = case(steps=70)
    near["alpha1"], near["alpha2"] = (torch.full_like(near["alpha1"], 1e30) for _ in range(2))  # snake(x) = x
    outputs, _ = simt_cases.run(program, tmp_path, [tensors, near])
    first, second = (o["y"].double() for o in outputs)  # alpha of 1e5 moves x by 1e-5 at most
    torch.testing.assert_close(first, second, rtol=0, atol=TOLERANCE["residual_unit", BF16])


# On rows that 13 channels keep from moving 16 bytes at a time warpgroup products do not run.
@pytest.mark.parametrize("channels, dtype, kernels", [(48, BF16, 3), (13, F16, 2), (40, F32, 1)], ids=str)
def test_bits(program: Path, tmp_path: Path, channels: int, dtype: torch.dtype, kernels: int) -> None:
    """A clip's bits are its own: not the batch's, the tile's, the order of threads' or the layout's."""
    whole, _ = case(channels, 330, 2, dilation=3, dtype=dtype)
    cut = case(channels, 330, 2, dilation=3, dtype=dtype, lengths=[330, 70])[0]
    alone, short = {**whole, "x": whole["x"][1:]}, {**whole, "x": whole["x"][1:, :70]}
    turned = {**whole, "x": whole["x"].transpose(1, 2).contiguous().view(whole["x"].shape), "channels_first": 1}
    cases = [whole, {**whole, "multiprocessors": IDLE}, alone, turned, short, cut]
    outputs, names = simt_cases.run(program, tmp_path, cases)
    y, tiled, single, back, brief, padded = (bits(output(c, o)) for c, o in zip(cases, outputs, strict=True))
    assert len(names) == kernels
    assert torch.equal(y, tiled) and torch.equal(y, back)
    assert torch.equal(y[1:], single)
    assert torch.equal(padded[1, :70], brief[0]) and not padded[1, 70:].any()
    for seed in (2, 3):
        again, _ = simt_cases.run(program, tmp_path, [whole], seed)
        assert torch.equal(y, bits(output(whole, again[0])))
