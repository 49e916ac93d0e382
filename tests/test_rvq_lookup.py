"""rvq_lookup: codes back to a latent."""

from __future__ import annotations

from typing import Any

import opsuite as suite
import pytest
import torch
from tolerances import TOLERANCE
from torch import Tensor

from dualcodec_ext import ops, reference, testing
from dualcodec_ext.ops import packing


def make(
    channels: int = 20,
    frames: int = 30,
    stages: int = 3,
    entries: int = 50,
    dim: int = 8,
    batch: int = 2,
    seed: int = 0,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Codes, weights and an addend."""
    gen = torch.Generator().manual_seed(seed)
    weights = {
        "codebooks": torch.randn(stages, entries, dim, generator=gen),
        "out_weight": torch.randn(stages, channels, dim, generator=gen) / (stages * dim) ** 0.5,
        "out_bias": 0.1 * torch.randn(stages, channels, generator=gen),
    }
    codes = torch.randint(0, entries, (batch, stages, frames), generator=gen)
    return codes, weights, torch.randn(batch, channels, frames, generator=gen)


def check(codes: Tensor, weights: dict[str, Tensor], addend: Tensor | None, dtype: torch.dtype = torch.float32) -> None:
    weights = {k: v.to(dtype) for k, v in weights.items()}
    addend = None if addend is None else addend.to(dtype)
    with testing.poisoned_memory():
        y = ops.rvq_lookup(codes, **weights, addend=addend)
    doubles = {k: v.double() for k, v in weights.items()}
    expected = reference.rvq_lookup_ref(codes, **doubles, addend=None if addend is None else addend.double())
    assert y.dtype == dtype
    testing.assert_close(y, expected, TOLERANCE["rvq_lookup", dtype])


@pytest.mark.parametrize("stages, entries, dim", [(1, 33, 8), (3, 50, 5), (11, 1024, 8), (2, 1, 1), (2, 70, 64)])
@pytest.mark.parametrize("isa", suite.instruction_sets())
def test_forward(stages: int, entries: int, dim: int, isa: str) -> None:
    codes, weights, addend = make(stages=stages, entries=entries, dim=dim)
    with suite.instruction_set(isa):
        check(codes, weights, addend)
        check(codes, weights, None)


def test_codec_shape() -> None:
    codes, weights, addend = make(1024, 120, 7, 4096, batch=1)
    doubles = {k: v.double() for k, v in weights.items()}
    testing.assert_close_to_f64(
        ops.rvq_lookup(codes, **weights, addend=addend),
        reference.rvq_lookup_ref(codes, **doubles, addend=addend.double()),
        reference.rvq_lookup_ref(codes, **weights, addend=addend),
    )


def test_every_prefix_of_stages() -> None:
    codes, weights, addend = make(stages=4)
    for n in range(1, 5):
        check(codes[:, :n], weights, addend)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_code_dtypes(dtype: torch.dtype) -> None:
    codes, weights, _ = make()
    assert torch.equal(ops.rvq_lookup(codes.to(dtype), **weights), ops.rvq_lookup(codes, **weights))


def test_gradient() -> None:
    codes, weights, addend = make(channels=4, frames=5, entries=6, dim=3)
    doubles = [t.double().requires_grad_() for t in [*weights.values(), addend]]
    assert torch.autograd.gradcheck(lambda *t: ops.rvq_lookup(codes, *t), doubles, fast_mode=True)


def test_gradient_needs_plain_weights() -> None:
    codes, weights, addend = make()
    packed = packing.pack_rvq(torch.zeros(3, 8, 20), torch.zeros(3, 8), **weights)
    with pytest.raises(RuntimeError, match="rvq_lookup: packed must be None when a weight needs a gradient"):
        ops.rvq_lookup(codes, **weights, addend=addend.requires_grad_(), packed=packed)


@pytest.mark.parametrize("dtype", suite.DTYPES, ids=str)
@pytest.mark.parametrize("isa", suite.instruction_sets())
def test_dtypes(dtype: torch.dtype, isa: str) -> None:
    codes, weights, addend = make(channels=33)
    with suite.instruction_set(isa):
        check(codes, weights, addend, dtype)


def test_strides_and_slices() -> None:
    codes, weights, addend = make(channels=19)
    expected = ops.rvq_lookup(codes, **weights, addend=addend)
    for name, view in testing.strided_copies(addend).items():
        y = ops.rvq_lookup(codes, **weights, addend=view)
        assert torch.equal(y, expected), name
        assert y.stride(1) == 1 if view.stride(1) == 1 else y.is_contiguous(), name
    assert torch.equal(ops.rvq_lookup(codes.mT.contiguous().mT, **weights, addend=addend), expected)
    last = ops.rvq_lookup(codes, **weights, channels_last=True)
    assert last.stride(1) == 1 and torch.equal(last, ops.rvq_lookup(codes, **weights))


@pytest.mark.parametrize("frames", suite.EDGE_STEPS)
def test_edge_sizes(frames: int) -> None:
    for batch in (0, 2):
        check(*make(frames=frames, batch=batch))


def test_lengths() -> None:
    codes, weights, addend = make(batch=4)
    lengths = torch.tensor([30, 0, 1, 17])
    behind = torch.where(torch.arange(30) >= lengths[:, None, None], torch.tensor(10**9), codes)
    y = ops.rvq_lookup(behind, **weights, addend=testing.poison_past_lengths(addend, lengths), lengths=lengths)
    for i, n in enumerate(lengths.tolist()):
        alone = ops.rvq_lookup(codes[i : i + 1, :, :n], **weights, addend=addend[i : i + 1, :, :n])
        assert torch.equal(y[i : i + 1, :, :n], alone) and not y[i, :, n:].any()


@pytest.mark.parametrize("value", [50, -1, 2**40])
def test_a_code_out_of_range_is_named(value: int) -> None:
    codes, weights, _ = make()
    codes[1, 2, 7] = value
    codes[1, 2, 20] = value
    with pytest.raises(ValueError, match=rf"codes must be in \[0, 50\), got {value} at batch 1, stage 2, frame 7"):
        ops.rvq_lookup(codes, **weights)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"codes": torch.zeros(2, 30, dtype=torch.int64)}, r"codes must be \[B, q, F\], got \[2, 30\]"),
        ({"codes": torch.zeros(2, 3, 30)}, "codes must be integers, got Float"),
        (
            {"codes": torch.zeros(2, 4, 30, dtype=torch.int64)},
            r"codes must have 1..3 stages, got \[2, 4, 30\]",
        ),
        (
            {"codes": torch.zeros(2, 0, 30, dtype=torch.int64)},
            r"codes must have 1..3 stages, got \[2, 0, 30\]",
        ),
        ({"out_bias": torch.zeros(3, 19)}, r"out_bias must be \[Q, C\] = \[3, 20\], got \[3, 19\]"),
        (
            {"addend": torch.zeros(2, 20, 29)},
            r"addend must be \[B, C, F\] = \[2, 20, 30\], got \[2, 20, 29\]",
        ),
        ({"codes": [[[0]]]}, "codes must be a tensor, got list"),
        ({"lengths": torch.tensor([31, 0])}, r"lengths\[0\] must be in 0..30, got 31"),
        ({"packed": torch.zeros(3)}, "packed must be a contiguous Float tensor of"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_errors(change: dict[str, Any], text: str) -> None:
    codes, weights, _ = make()
    with pytest.raises(ValueError, match=f"rvq_lookup: {text}") as raised:
        ops.rvq_lookup(**{"codes": codes, **weights, **change})
    assert "\n" not in str(raised.value)


def test_opcheck() -> None:
    codes, weights, addend = make()
    w = [t.requires_grad_() for t in weights.values()]
    suite.check_opcheck("rvq_lookup", codes, *w, addend.requires_grad_(), torch.tensor([30, 4]), False, None)
    suite.check_opcheck("rvq_lookup", codes, *[t.detach() for t in w], None, None, True, None)


def test_compiles() -> None:
    codes, weights, addend = make()
    compiled = torch.compile(lambda c, a: ops.rvq_lookup(c, **weights, addend=a), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(codes, addend), ops.rvq_lookup(codes, **weights, addend=addend))


def test_determinism() -> None:
    codes, weights, addend = make(128, 333, batch=3)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ops.rvq_lookup(codes, **weights, addend=addend))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    parts = [
        ops.rvq_lookup(c, **weights, addend=a) for c, a in zip(codes.split(50, -1), addend.split(50, -1), strict=True)
    ]
    assert torch.equal(torch.cat(parts, -1), results[0])
