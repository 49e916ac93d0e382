"""The ops' overloads that write into memory that is there: the plain ones' bits, and one line for a wrong `out`."""

from __future__ import annotations

from typing import Any

import opsuite as suite
import pytest
import test_causal_dwconv1d as dwconv
import test_residual_unit as unit
import test_rvq_lookup as lookup
import test_snake_conv1d as conv
import test_snake_upsample1d as upsample
import torch
from torch import Tensor

OPS = ("causal_dwconv1d", "residual_unit", "rvq_lookup", "snake_conv1d", "snake_upsample1d")


def call_of(op: str, dtype: torch.dtype = torch.float32) -> tuple[list[Any], dict[str, Any]]:
    """The positional arguments of a call of an op, and the keyword arguments of `out` besides `out`."""
    if op == "rvq_lookup":
        codes, w, addend = lookup.make(33, 19, 3, 20, 8, 2, 0)
        weights = [w[k].to(dtype) for k in ("codebooks", "out_weight", "out_bias")]
        return [codes, *weights, None if addend is None else addend.to(dtype), None, True, None], {}
    if op == "causal_dwconv1d":
        made = dwconv.case(33, 7, 40)
        order: tuple[str, ...] = ("weight", "bias")
        rest = [(6, 0), *(made.weights.get(k) for k in ("ln_weight", "ln_bias")), 1e-6, None]
    elif op == "residual_unit":
        made = unit.case(33)
        order, rest = ("alpha1", "weight1", "bias1", "alpha2", "weight2", "bias2"), [3, (0, 0), False, None, None]
    elif op == "snake_conv1d":
        made = conv.case(20, 33, 7, 40)
        order, rest = ("weight", "bias", "alpha"), [2, 1, (3, 3), "tanh", None, None, None]
    else:
        made = upsample.case(20, 33)
        order, rest = ("alpha", "weight", "bias"), [4, "transposed", (2, 2), None, None]
    cast = [None if t is None else t.to(dtype) for t in (made.x, *(made.weights[k] for k in order))]
    return [*cast, *rest], {"first": 0} if op == "snake_upsample1d" else {}


def overload(op: str) -> Any:
    return getattr(torch.ops.dualcodec_ext, op)


def stretch(like: Tensor, extra: int = 5) -> tuple[Tensor, Tensor]:
    """Memory of NaN, and channels-last rows in the middle of it, shaped as `like`."""
    batch, channels, steps = like.shape
    memory = torch.full((batch, steps + 2 * extra, channels), torch.nan, dtype=like.dtype, device=like.device)
    return memory, memory[:, extra : extra + steps].transpose(1, 2)


@pytest.mark.parametrize("dtype", suite.DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_the_bits_of_the_plain_op_and_nothing_beside(op: str, dtype: torch.dtype) -> None:
    args, more = call_of(op, dtype)
    expected = overload(op)(*args)
    memory, rows = stretch(expected)
    overload(op).out(*args, **more, out=rows)
    assert torch.equal(rows, expected)
    assert int(memory.isnan().sum()) == memory.numel() - expected.numel()
    plain = torch.empty_like(expected.contiguous())
    overload(op).out(*args, **more, out=plain)
    assert torch.equal(plain, expected)


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_out(op: str) -> None:
    args, more = call_of(op)
    y = overload(op)(*args)
    longer = y.new_empty(y.shape[0], y.shape[1], y.shape[2] + 1)
    size = "first" if op == "snake_upsample1d" else r"T'\] = "
    for out, text in (
        (longer, f"out must be .*{size}"),
        (y.new_empty(y.shape[0], y.shape[1] + 1, y.shape[2]), "out must be"),
        (y.new_empty(y.shape[1:]), "out must be"),
        (y.double(), "out must be Float as the input is, got Double"),
    ):
        with pytest.raises(ValueError, match=f"{op}: {text}") as raised:
            overload(op).out(*args, **more, out=out)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    args, more = call_of(op)
    more["out"] = torch.empty_like(overload(op)(*args))
    tests = ["test_schema", "test_faketensor"]
    if op != "snake_upsample1d":  # torch's functionalisation passes arguments by name, and can't pass one called mode
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(overload(op).out, args, more, test_utils=tests)


@pytest.mark.parametrize("op", OPS)
def test_nothing_to_write(op: str) -> None:
    args, more = call_of(op)
    args[0] = args[0][:0]
    if op == "rvq_lookup" and args[4] is not None:
        args[4] = args[4][:0]
    out = overload(op)(*args)
    overload(op).out(*args, **more, out=out)
    assert out.numel() == 0


@pytest.mark.parametrize("mode, padding", [("transposed", (2, 2)), ("repeat", (7, 0)), ("repeat", (2, 5))])
@pytest.mark.parametrize("lengths", [None, [20, 7]])
def test_any_stretch_of_an_upsampling(mode: str, padding: tuple[int, int], lengths: list[int] | None) -> None:
    made = upsample.case(20, 33, 4, mode, padding=padding)
    own = None if lengths is None else torch.tensor(lengths)
    args = [made.x, *(made.weights[k] for k in ("alpha", "weight", "bias")), 4, mode, padding, own, None]
    whole = torch.ops.dualcodec_ext.snake_upsample1d(*args)
    for first in (0, 1, 3, 4, 5, 30, whole.shape[2] - 1, whole.shape[2]):
        for count in (0, 1, 2, 4, 9, whole.shape[2]):
            kept = whole[:, :, first : first + count]
            memory, rows = stretch(kept)
            torch.ops.dualcodec_ext.snake_upsample1d.out(*args, first=first, out=rows)
            assert torch.equal(rows, kept)
            assert int(memory.isnan().sum()) == memory.numel() - kept.numel()
    with pytest.raises(ValueError, match=r"snake_upsample1d: out must be \[B, C, N\] with first \+ N in 0\.\."):
        torch.ops.dualcodec_ext.snake_upsample1d.out(*args, first=-1, out=whole[:, :, :3].clone())


def test_a_lookup_may_write_over_its_addend() -> None:
    args, _ = call_of("rvq_lookup")
    assert args[4] is not None
    expected = torch.ops.dualcodec_ext.rvq_lookup(*args)
    args[4] = args[4].clone()
    torch.ops.dualcodec_ext.rvq_lookup.out(*args, out=args[4])
    assert torch.equal(args[4], expected)


def test_a_lookup_that_notes_a_wrong_code_goes_on() -> None:
    args, _ = call_of("rvq_lookup")
    none = torch.iinfo(torch.int64).max
    error, y = torch.tensor([none]), torch.ops.dualcodec_ext.rvq_lookup(*args)
    out = torch.empty_like(y)
    torch.ops.dualcodec_ext.rvq_lookup.out(*args, error=error, out=out)
    assert torch.equal(out, y) and int(error) == none
    stages, frames = args[0].shape[1:]
    for b, stage, frame in ((1, 2, 4), (1, 0, 7), (0, 1, 3)):  # the lowest of all calls stays
        args[0] = args[0].clone()
        args[0][b, stage, frame] = -1
        torch.ops.dualcodec_ext.rvq_lookup.out(*args, error=error, out=out)
        assert int(error) == (b * stages + stage) * frames + frame
    torch.ops.dualcodec_ext.rvq_lookup.out(*args, error=error.fill_(0), out=out)
    assert int(error) == 0
    for wrong in (torch.zeros(2, dtype=torch.int64), torch.zeros(1)):
        with pytest.raises(ValueError, match="rvq_lookup: error must be one int64 on cpu as the codes are, got"):
            torch.ops.dualcodec_ext.rvq_lookup.out(*args, error=wrong, out=out)
    with pytest.raises(ValueError, match=r"rvq_lookup: codes must be in \[0, "):
        torch.ops.dualcodec_ext.rvq_lookup.out(*args, out=out)
