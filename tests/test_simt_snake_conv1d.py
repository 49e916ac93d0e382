"""The CUDA kernels of snake_conv1d on the CPU, against the float64 reference: every tile that ships."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from simt_inputs import conv_case, run_one, same_bits, worst
from tolerances import TOLERANCE

OP = "snake_conv1d"
pytestmark = pytest.mark.usefixtures("one_thread")
HOPPER_SHARED_BYTES = 227 << 10
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# A kernel by its tile's rows and columns, with whether its reduction has ranges; shapes with a full tile and a tail.
HALF: dict[str, tuple[str, dict[str, Any]]] = {
    "Large": ("128, 128, 4, false", {"channels": 96, "columns": 128, "taps": 3, "steps": 150}),
    "Large, a tail of columns": (
        "128, 128, 4, false",
        {"channels": 48, "columns": 232, "taps": 1, "steps": 131, "alpha": False, "activation": "gelu"},
    ),
    "LargeRanged": ("128, 128, 4, true", {"channels": 160, "columns": 128, "steps": 140}),
    "Narrow": (
        "128, 96, 4, false",
        {"channels": 96, "columns": 96, "steps": 130, "batch": 2, "lengths": [130, 77], "residual": True},
    ),
    "Narrow, a tail of columns": ("128, 96, 4, false", {"channels": 48, "columns": 168, "taps": 3, "steps": 129}),
    "Slim": ("128, 48, 4, false", {"channels": 48, "columns": 48, "steps": 200, "dilation": 3, "residual": True}),
    "Slim, a tail of columns": (
        "128, 48, 4, false",
        {"channels": 40, "columns": 19, "steps": 135, "dilation": 9, "bias": False},
    ),
    "Small": (
        "64, 64, 4, true",
        {"channels": 96, "columns": 192, "steps": 70, "residual": True, "multiprocessors": 9},
    ),
    "Small, spread": ("64, 64, 4, true", {"channels": 192, "columns": 72, "steps": 70, "multiprocessors": 1000}),
    "Frame": ("16, 64, 8, true", {"channels": 192, "columns": 96, "steps": 3, "padding": (6, 0)}),
    "Frame, spread": (
        "16, 64, 8, true",
        {"channels": 384, "columns": 40, "steps": 1, "padding": (6, 0), "multiprocessors": 1000},
    ),
    "Frame, several clips": (
        "16, 64, 8, true",
        {"channels": 96, "columns": 64, "steps": 3, "batch": 5, "lengths": [3, 0, 1, 2, 3]},
    ),
}
# The tiles of warpgroup products: rows / 64, columns, stages, ranges, blocks, warpgroups that copy and finish alone.
WGMMA: dict[str, tuple[str, dict[str, Any]]] = {
    "Flat": ("2, 128, 3, false", {"channels": 96, "columns": 128, "taps": 3, "steps": 150}),
    "Flat, a tail of columns": (
        "2, 128, 3, false",
        {"channels": 48, "columns": 232, "taps": 1, "steps": 131, "alpha": False, "activation": "gelu"},
    ),
    "Large, ranges": ("2, 128, 6, true", {"channels": 160, "columns": 128, "steps": 140, "dilation": 9}),
    "Wide": ("2, 192, 6, true", {"channels": 160, "columns": 192, "steps": 140, "dilation": 9, "residual": True}),
    "Wide, spread, a tail of columns": (
        "2, 192, 6, true",
        {"channels": 320, "columns": 360, "steps": 200, "dilation": 3, "multiprocessors": 5},
    ),
    "Large, spread": ("2, 128, 6, true", {"channels": 320, "columns": 128, "steps": 200, "multiprocessors": 3}),
    "Narrow": (
        "2, 96, 6, false",
        {"channels": 96, "columns": 96, "steps": 130, "batch": 2, "lengths": [130, 77], "residual": True},
    ),
    "Narrow, a tail of columns": ("2, 96, 6, false", {"channels": 48, "columns": 168, "taps": 3, "steps": 129}),
    "Half": ("2, 64, 5, false", {"channels": 64, "columns": 64, "taps": 2, "steps": 140, "alpha": False}),
    "Slim": ("2, 48, 5, false", {"channels": 48, "columns": 48, "steps": 200, "dilation": 3, "residual": True}),
    "Slim, a tail of columns": (
        "2, 48, 5, false",
        {"channels": 40, "columns": 19, "steps": 135, "dilation": 9, "bias": False},
    ),
    "Small, spread": ("1, 64, 8, true, 3", {"channels": 320, "columns": 72, "steps": 70, "multiprocessors": 7}),
    "Helped": (
        "1, 64, 8, true, 2, 1",
        {"channels": 96, "columns": 192, "steps": 70, "residual": True, "multiprocessors": 9},
    ),
    "Helped, spread": ("1, 64, 8, true, 2, 1", {"channels": 192, "columns": 72, "steps": 70, "multiprocessors": 7}),
    "Helped, spread in three": (
        "1, 64, 8, true, 2, 1",
        {"channels": 192, "columns": 72, "taps": 11, "steps": 90, "multiprocessors": 7, "residual": True},
    ),
    "Helped, a frame": (
        "1, 64, 8, true, 2, 1",
        {"channels": 384, "columns": 40, "steps": 1, "first": True, "multiprocessors": 1000},
    ),
    "Helped, several clips": (
        "1, 64, 8, true, 2, 1",
        {"channels": 96, "columns": 96, "steps": 3, "batch": 25, "lengths": [3, 0, 1, 2, 3] * 5, "multiprocessors": 5},
    ),
    "Frame": (
        "1, 32, 12, false, 1, 1",
        {"channels": 768, "columns": 72, "taps": 1, "steps": 3, "first": True, "multiprocessors": 132},
    ),
    "Frame, GELU, a residual, two tiles of rows": (
        "1, 32, 12, false, 1, 1",
        {
            "channels": 616,
            "columns": 40,
            "taps": 1,
            "steps": 70,
            "alpha": False,
            "activation": "gelu",
            "residual": True,
            "multiprocessors": 132,
        },
    ),
    "Frame, several clips": (
        "1, 32, 12, false, 1, 1",
        {
            "channels": 72,
            "columns": 40,
            "steps": 2,
            "batch": 9,
            "first": True,
            "lengths": [2, 1, 0] * 3,
            "multiprocessors": 132,
        },
    ),
}
# Tiles of 8 rows that a warp multiplies.
FEW: dict[str, tuple[int, dict[str, Any]]] = {
    "a frame": (1, {"channels": 192, "columns": 72, "steps": 1, "padding": (6, 0)}),
    "eight ranges, taps apart": (1, {"channels": 768, "columns": 24, "steps": 2, "dilation": 9, "residual": True}),
    "eight ranges, a ring": (1, {"channels": 1024, "columns": 40, "steps": 1, "batch": 2, "lengths": [1, 0]}),
    "a ring, half a chunk": (1, {"channels": 480, "columns": 19, "steps": 5, "shared_bytes": 99 << 10}),
    "1x1": (1, {"channels": 72, "columns": 40, "taps": 1, "steps": 64, "alpha": False, "activation": "gelu"}),
    "three ranges": (1, {"channels": 192, "columns": 24, "taps": 11, "steps": 12, "bias": False}),
    "clips": (1, {"channels": 72, "columns": 40, "steps": 5, "batch": 9, "lengths": [5, 0, 3] * 3, "residual": True}),
    "clips and taps apart": (2, {"channels": 160, "columns": 24, "steps": 2, "batch": 17, "dilation": 3}),
    "a linear layer": (2, {"channels": 2048, "columns": 24, "taps": 1, "steps": 1, "batch": 32, "alpha": False}),
    "more cells than threads": (1, {"channels": 2120, "columns": 24, "taps": 1, "steps": 3}),
    "many rows": (4, {"channels": 320, "columns": 24, "steps": 40, "dilation": 3, "residual": True}),
    "tiles that are all there at once": (
        1,
        {"channels": 96, "columns": 48, "taps": 3, "steps": 100, "batch": 2, "lengths": [100, 40]},
    ),
    "two tiles of rows": (4, {"channels": 592, "columns": 16, "steps": 40}),
    "two tiles of clips": (4, {"channels": 592, "columns": 16, "steps": 7, "batch": 6, "lengths": [7, 1, 0] * 2}),
}
FLOAT: dict[str, tuple[str, dict[str, Any]]] = {
    "FloatSmall": ("FloatTile<64, 64>", {"channels": 48, "columns": 64, "steps": 66, "residual": True}),
    "FloatSmall, tails": (
        "FloatTile<64, 64>",
        {"channels": 40, "columns": 74, "steps": 35, "batch": 3, "dilation": 3, "lengths": [35, 20, 0]},
    ),
    "FloatFrame": ("FloatTile<16, 64>", {"channels": 96, "columns": 64, "steps": 16, "activation": "gelu"}),
    "FloatFrame, tails": ("FloatTile<16, 64>", {"channels": 40, "columns": 72, "steps": 5, "batch": 2}),
    "Tf32Small": ("Tf32Tile<64, 64, 2, 2>", {"channels": 48, "columns": 64, "steps": 66, "allow_tf32": 1}),
    "Tf32Small, tails": (
        "Tf32Tile<64, 64, 2, 2>",
        {"channels": 40, "columns": 72, "steps": 35, "batch": 2, "allow_tf32": 1, "lengths": [30, 35]},
    ),
    "Tf32Small, spread": (
        "Tf32Tile<64, 64, 2, 2>",
        {"channels": 160, "columns": 24, "steps": 20, "allow_tf32": 1, "multiprocessors": 1000},
    ),
}
NARROW: dict[str, dict[str, Any]] = {
    "many channels": {"channels": 96, "columns": 2, "steps": 140, "activation": "tanh"},
    "a tail of channels": {"channels": 48, "columns": 3, "steps": 130, "batch": 2, "lengths": [130, 50]},
    "strided": {"channels": 40, "columns": 4, "taps": 3, "steps": 60, "dilation": 2, "stride": 2, "residual": True},
}
SLIDING: dict[str, dict[str, Any]] = {
    "the decoder's last": {"channels": 48, "steps": 1500, "activation": "tanh"},
    "short stretches": {"channels": 48, "steps": 400, "batch": 2, "lengths": [400, 50], "multiprocessors": 1000},
    "one row": {"channels": 48, "steps": 1, "batch": 3, "lengths": [1, 0, 1], "padding": (6, 0), "residual": True},
    "odd channels": {"channels": 37, "steps": 300, "bias": False},
    "no Snake, channels first": {"channels": 16, "steps": 150, "batch": 2, "alpha": False, "first": True},
    "25hz_v1's last": {"channels": 96, "steps": 700, "activation": "tanh", "multiprocessors": 1},
    "several tiles of a block": {"channels": 48, "steps": 2900, "lengths": [2500], "multiprocessors": 1},
    "many channels": {"channels": 256, "steps": 200, "padding": (0, 9), "multiprocessors": 1000},
    "nothing left": {"channels": 40, "steps": 4, "padding": (0, 0)},
}
ONE_INPUT: dict[str, dict[str, Any]] = {
    "the encoder's first": {"channels": 1, "columns": 32, "steps": 300, "alpha": False, "padding": (3, 3)},
    "tails": {"channels": 1, "columns": 40, "steps": 77, "batch": 3, "lengths": [77, 30, 0], "residual": True},
    "channels first": {
        "channels": 1,
        "columns": 8,
        "steps": 30,
        "first": True,
        "padding": (6, 0),
    },
}
SHAPES: dict[str, dict[str, Any]] = {
    "the encoder's first": {"channels": 1, "columns": 32, "steps": 100, "alpha": False},
    "strided by 4": {"channels": 32, "columns": 64, "taps": 8, "steps": 160, "stride": 4, "padding": (2, 2)},
    "strided by 5, a tail of taps": {"channels": 24, "columns": 40, "taps": 11, "steps": 83, "stride": 5},
    "strided and dilated": {"channels": 13, "columns": 19, "taps": 5, "steps": 50, "stride": 2, "dilation": 2},
    "1x1, strided": {"channels": 48, "columns": 24, "taps": 1, "steps": 33, "stride": 3},
    "channels first": {"channels": 48, "columns": 40, "steps": 50, "batch": 2, "first": True, "residual": True},
    "odd channels": {"channels": 37, "columns": 21, "steps": 20, "batch": 3, "residual": True},
    "wide padding": {"channels": 40, "columns": 24, "steps": 5, "padding": (20, 9)},
    "nothing left": {"channels": 40, "columns": 24, "steps": 4, "padding": (0, 0)},
    "no steps": {"channels": 40, "columns": 24, "steps": 0},
    "lengths and strides": {
        "channels": 32,
        "columns": 24,
        "taps": 4,
        "steps": 41,
        "stride": 2,
        "batch": 3,
        "lengths": [41, 6, 0],
    },
}


def check(case_options: dict[str, Any], kernel: str, folder: Path, **more: Any) -> None:
    case = conv_case(**case_options, **more)
    y, names = run_one(OP, folder, case)
    tolerance = TOLERANCE["snake_conv1d, tf32" if case_options.get("allow_tf32") else OP, y.dtype]
    assert worst(y, case.expected) <= tolerance
    assert not kernel or [kernel in name for name in names if "ConvRows" not in name] == [True], names


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize(("kernel", "options"), HALF.values(), ids=HALF.keys())
def test_tiles_of_16_bits(kernel: str, options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    check(options, kernel, tmp_path, dtype=dtype, wgmma=0)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize(("kernel", "options"), WGMMA.values(), ids=WGMMA.keys())
def test_tiles_of_warpgroups(kernel: str, options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    check(options, f"f16, {kernel}", tmp_path, dtype=dtype, shared_bytes=HOPPER_SHARED_BYTES)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize(("tiles", "options"), FEW.values(), ids=FEW.keys())
def test_few_rows(tiles: int, options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    """Right, and bit for bit what warpgroup products give, which take x where its channels are not side by side."""
    device = {"shared_bytes": HOPPER_SHARED_BYTES, "multiprocessors": 132, **options}
    case = conv_case(dtype=dtype, **device)
    y, name = bits(tmp_path, case)
    assert f"ConvFew<dcx::{'bf16' if dtype == BF16 else 'f16'}, {tiles}>" in name
    assert worst(y, case.expected) <= TOLERANCE[OP, y.dtype]
    other, name = bits(tmp_path, conv_case(dtype=dtype, first=True, **{**device, "shared_bytes": HOPPER_SHARED_BYTES}))
    assert "ConvWgmma" in name and same_bits(y, other)
    for seed in (2, 3):
        assert same_bits(y, bits(tmp_path, case, seed)[0])


@pytest.mark.parametrize(("kernel", "options"), FLOAT.values(), ids=FLOAT.keys())
def test_tiles_of_float32(kernel: str, options: dict[str, Any], tmp_path: Path) -> None:
    check(options, kernel, tmp_path, dtype=F32)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("options", NARROW.values(), ids=NARROW.keys())
def test_few_outputs(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    check(options, "NarrowConv", tmp_path, dtype=dtype)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("options", SLIDING.values(), ids=SLIDING.keys())
def test_one_output_of_seven_taps(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    channels, kernel = options["channels"], "SlidingConv"
    if dtype != F32:
        kernel = f", {3 if channels <= 48 else 6}>" if channels <= 96 else "NarrowConv"
    check({"columns": 1, **options}, "" if options["steps"] == 4 else kernel, tmp_path, dtype=dtype)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_bits_of_one_output_depend_on_no_stretch_and_no_layout(dtype: torch.dtype, tmp_path: Path) -> None:
    whole = conv_case(48, 1, steps=800, dtype=dtype, padding=(6, 0))
    y, _ = bits(tmp_path, whole)
    for multiprocessors in (3, 5, 1000):
        assert same_bits(y, bits(tmp_path, whole, multiprocessors=multiprocessors)[0])
    first, _ = bits(tmp_path, conv_case(48, 1, steps=800, dtype=dtype, padding=(6, 0), first=True))
    assert same_bits(y.flatten(), first.flatten())
    x = whole.tensors["x"]
    assert isinstance(x, torch.Tensor)
    assert same_bits(y[:, :91], bits(tmp_path, whole.with_(x=x[:, :91].contiguous()))[0])


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("options", ONE_INPUT.values(), ids=ONE_INPUT.keys())
def test_one_input(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    for sizes in ({"multiprocessors": 1}, {"multiprocessors": 1000}):
        check(options, "SpreadConv", tmp_path, dtype=dtype, **sizes)


@pytest.mark.parametrize(("dtype", "wgmma"), [(F32, 0), (F16, 0), (F16, 1), (BF16, 1)], ids=str)
@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(options: dict[str, Any], dtype: torch.dtype, wgmma: int, tmp_path: Path) -> None:
    check(options, "", tmp_path, dtype=dtype, wgmma=wgmma)


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES.keys())
def test_shapes_of_many_clips(options: dict[str, Any], tmp_path: Path) -> None:
    """So many rows that few_rows' kernel does not take them."""
    clips = {"batch": options.get("batch", 1) * 40, "lengths": options.get("lengths", []) * 40 or None}
    case = conv_case(**{**options, **clips})
    y, names = run_one(OP, tmp_path, case)
    assert worst(y, case.expected) <= TOLERANCE[OP, y.dtype]
    assert not any("ConvFew" in name for name in names)


def bits(folder: Path, case: Any, seed: int = 1, **device: int) -> tuple[torch.Tensor, str]:
    y, names = run_one(OP, folder, case.with_(**device), seed)
    (name,) = [name for name in names if "ConvRows" not in name]
    return y, name


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"channels": 160, "columns": 128, "steps": 140, "wgmma": 0}, [1, 6, 1000]),
        ({"channels": 192, "columns": 72, "steps": 9, "wgmma": 0}, [1, 1000]),
        ({"channels": 160, "columns": 128, "steps": 140, "shared_bytes": HOPPER_SHARED_BYTES}, [1, 6, 1000]),
        ({"channels": 192, "columns": 72, "steps": 9, "first": True}, [1, 1000]),
        ({"channels": 160, "columns": 72, "steps": 30, "dtype": F32, "allow_tf32": 1}, [1, 1000]),
    ],
    ids=["128 rows, 64 rows, spread", "a frame", "warpgroups", "warpgroups, a frame", "tf32"],
)
def test_bits_depend_on_no_tile_and_no_spread(options: dict[str, Any], sizes: list[int], tmp_path: Path) -> None:
    case = conv_case(**options)
    first, *others = [bits(tmp_path, case, multiprocessors=n)[0] for n in sizes]
    assert all(same_bits(first, y) for y in others)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_bits_depend_on_no_batch(dtype: torch.dtype, tmp_path: Path) -> None:
    """Seventeen clips of one frame take another kernel than one clip does."""
    whole = conv_case(160, 64, steps=1, batch=17, padding=(6, 0), dtype=dtype, wgmma=0)
    x = whole.tensors["x"]
    assert isinstance(x, torch.Tensor)
    many, tile = bits(tmp_path, whole)
    for batch in (1, 5):
        few, other = bits(tmp_path, whole.with_(x=x[:batch].contiguous()))
        assert same_bits(many[:batch], few) and tile != other


def test_bits_of_warpgroups_depend_on_no_batch(tmp_path: Path) -> None:
    """Many clips of two frames take a large tile, few a small one with a block per range."""
    sizes = {"multiprocessors": 4, "shared_bytes": HOPPER_SHARED_BYTES}
    whole = conv_case(160, 128, steps=2, batch=160, padding=(6, 0), dtype=BF16, **sizes)
    x = whole.tensors["x"]
    assert isinstance(x, torch.Tensor)
    many, tile = bits(tmp_path, whole)
    for batch in (1, 25):
        few, other = bits(tmp_path, whole.with_(x=x[:batch].contiguous(), multiprocessors=1000))
        assert same_bits(many[:batch], few) and tile != other


def test_bits_depend_on_no_cut(tmp_path: Path) -> None:
    whole = conv_case(96, 64, steps=70, padding=(6, 0), dilation=1)
    x = whole.tensors["x"]
    assert isinstance(x, torch.Tensor)
    y, _ = bits(tmp_path, whole)
    head, _ = bits(tmp_path, whole.with_(x=x[:, :9].contiguous()))
    tail, _ = bits(tmp_path, whole.with_(x=x[:, 50:].contiguous(), left=0))
    assert same_bits(y[:, :9], head) and same_bits(y[:, 56:], tail)


def test_bits_depend_on_no_layout(tmp_path: Path) -> None:
    options = {"steps": 30, "batch": 2, "residual": True, "shared_bytes": HOPPER_SHARED_BYTES}
    for dtype in (F32, F16):
        plain, _ = bits(tmp_path, conv_case(48, 40, dtype=dtype, **options))
        first, _ = bits(tmp_path, conv_case(48, 40, dtype=dtype, first=True, **options))
        assert same_bits(plain, first)


def test_bits_depend_on_no_order_of_threads(tmp_path: Path) -> None:
    for options in (
        {"channels": 96, "columns": 72, "steps": 20, "multiprocessors": 1000},
        {"channels": 40, "columns": 3},
    ):
        case = conv_case(**options)
        first, *others = [bits(tmp_path, case, seed)[0] for seed in range(1, 5)]
        assert all(same_bits(first, y) for y in others)
