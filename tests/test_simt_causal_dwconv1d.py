"""The CUDA kernel of causal_dwconv1d on the CPU, against the float64 reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import simt_cases
import torch
from simt_inputs import dwconv_case, run_one, same_bits, worst
from tolerances import TOLERANCE

OP = "causal_dwconv1d"
pytestmark = pytest.mark.usefixtures("one_thread")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# multiprocessors=1 takes eight rows at a time, 1000 one row.
CASES: dict[str, dict[str, Any]] = {
    "K=7, C=768": {"channels": 768, "steps": 19},
    "K=7, C=768, a row at a time": {"channels": 768, "steps": 3, "multiprocessors": 1000},
    "K=31, C=1024": {"channels": 1024, "taps": 31, "steps": 11},
    "K=31, C=1024, a row at a time": {"channels": 1024, "taps": 31, "steps": 2, "multiprocessors": 1000},
    "K=31, centred, no LayerNorm": {"channels": 1024, "taps": 31, "padding": (15, 15), "norm": False},
    "centred": {"channels": 768, "padding": (3, 3), "steps": 9},
    "float32": {"channels": 768, "steps": 17, "batch": 2, "dtype": F32},
    "float32, a row at a time": {"channels": 96, "steps": 5, "dtype": F32, "multiprocessors": 1000},
    "float16": {"channels": 768, "steps": 10, "dtype": F16},
    "float16, a row at a time": {"channels": 96, "steps": 5, "dtype": F16, "multiprocessors": 1000},
    "wider than a pass": {"channels": 2052, "steps": 9, "dtype": F32},
    "weights in slabs": {"channels": 300, "taps": 31, "steps": 19, "dtype": F32, "shared_bytes": 20000},
    "weights in slabs, a row at a time": {"channels": 2500, "taps": 31, "steps": 2, "shared_bytes": 14000},
    "lengths": {"channels": 64, "steps": 21, "batch": 4, "lengths": [21, 0, 8, 1]},
    "lengths, centred": {"channels": 64, "steps": 21, "batch": 3, "lengths": [2, 21, 9], "padding": (3, 3)},
    "channels first": {"channels": 48, "steps": 13, "batch": 2, "first": True},
    "odd C": {"channels": 33, "steps": 9, "dtype": F16},
    "odd C, channels first": {"channels": 33, "steps": 9, "dtype": F32, "first": True},
    "one channel": {"channels": 1, "taps": 3, "steps": 9, "dtype": F32, "norm": False},
    "one tap": {"channels": 20, "taps": 1, "steps": 9},
    "even K": {"channels": 50, "taps": 64, "steps": 70, "dtype": F32},
    "wide padding": {"channels": 40, "padding": (20, 9), "steps": 5, "dtype": F32},
    "nothing but taps": {"channels": 40, "bias": False, "norm": False, "dtype": F32},
    "no ln_bias, a large eps": {"channels": 40, "norm_bias": False, "eps": 0.5, "dtype": F32},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_parity(options: dict[str, Any], tmp_path: Path) -> None:
    case = dwconv_case(**options)
    y, names = run_one(OP, tmp_path, case)
    assert worst(y, case.expected) <= TOLERANCE[OP, y.dtype]
    rows = 1 if options.get("multiprocessors") or "2500" in str(options["channels"]) else 8
    assert all(name.endswith(f", {rows}>") for name in names) and len(names) == 1


@pytest.mark.parametrize("steps", [0, 1, 6, 7, 8, 9, 16, 17])
def test_tails(steps: int, tmp_path: Path) -> None:
    case = dwconv_case(40, steps=steps, batch=3, padding=(3, 3), dtype=F32)
    y, _ = run_one(OP, tmp_path, case)
    assert worst(y, case.expected) <= TOLERANCE[OP, F32] and y.shape == case.expected.shape


@pytest.mark.parametrize("norm", [True, False])
def test_bits_depend_on_no_tile(norm: bool, tmp_path: Path) -> None:
    case = dwconv_case(300, steps=90, batch=2, dtype=F32, norm=norm)
    made = [run_one(OP, tmp_path, case.with_(multiprocessors=n)) for n in (1, 3, 1000)]
    assert len({name for _, names in made for name in names}) == 2
    slabs = run_one(OP, tmp_path, case.with_(shared_bytes=12000))
    assert all(same_bits(y, made[0][0]) for y, _ in [*made, slabs])


def test_bits_depend_on_no_batch_and_no_cut(tmp_path: Path) -> None:
    whole = dwconv_case(768, steps=12, batch=3)
    x = whole.tensors["x"]
    assert isinstance(x, torch.Tensor)
    y, _ = run_one(OP, tmp_path, whole)
    alone, _ = run_one(OP, tmp_path, whole.with_(x=x[1:2].contiguous()))
    assert same_bits(y[1:2], alone)
    head, _ = run_one(OP, tmp_path, whole.with_(x=x[:, :5].contiguous()))
    assert same_bits(y[:, :5], head)
    tail, _ = run_one(OP, tmp_path, whole.with_(x=x[:, 3:].contiguous(), left=0))
    assert same_bits(y[:, 9:], tail)


def test_bits_depend_on_no_order_of_threads(tmp_path: Path) -> None:
    for options in ({"channels": 768, "steps": 9}, {"channels": 260, "taps": 31, "shared_bytes": 16000}):
        case = dwconv_case(**options)
        first, *others = [run_one(OP, tmp_path, case, seed)[0] for seed in range(1, 6)]
        assert all(same_bits(first, y) for y in others)


def test_layouts_give_the_same_bits(tmp_path: Path) -> None:
    plain, _ = run_one(OP, tmp_path, dwconv_case(50, steps=10, batch=2, dtype=F32))
    first, _ = run_one(OP, tmp_path, dwconv_case(50, steps=10, batch=2, dtype=F32, first=True))
    assert same_bits(plain, first)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_alignment_changes_no_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    case = dwconv_case(50, steps=10, batch=2, dtype=dtype)
    plain, *moved = [run_one(OP, tmp_path, case.with_(shift=n))[0] for n in (0, 1, 2, 3)]
    assert all(same_bits(plain, y) for y in moved)


def test_no_clips(tmp_path: Path) -> None:
    y, names = run_one(OP, tmp_path, dwconv_case(40, batch=0))
    assert y.shape == (0, 12, 40) and names == set()


def test_layer_norm_of_a_large_mean(tmp_path: Path) -> None:
    """The second pass keeps the variance when the mean is a thousand times larger."""
    case = dwconv_case(100, dtype=F32)
    assert isinstance(case.tensors["bias"], torch.Tensor)
    y, _ = run_one(OP, tmp_path, case.with_(bias=case.tensors["bias"] + 1000.0))
    assert worst(y, case.expected) <= 1e-3


def test_nan_reaches_what_it_may_and_no_more(tmp_path: Path) -> None:
    case = dwconv_case(40, steps=20, dtype=F32)
    x = case.tensors["x"].clone()  # type: ignore[union-attr]
    x[0, 5, 7] = torch.nan
    y, _ = run_one(OP, tmp_path, case.with_(x=x))
    assert y[0].isnan().all(-1).nonzero().flatten().tolist() == list(range(5, 12))
    assert not y[0, :5].isnan().any() and not y[0, 12:].isnan().any()


def test_a_row_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(simt_cases.Failed, match=r"^causal_dwconv1d: a row of 5000 channels must fit .* 16384 bytes$"):
        run_one(OP, tmp_path, dwconv_case(5000, steps=1, shared_bytes=16384))
