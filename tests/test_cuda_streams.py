"""What a stream's passes on a GPU are made of: ops that write where they are told, rows brought in and taken back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu import DEVICE, DTYPES, by_dtype, gpu_alone, needs_device
from test_model import settings_of
from test_out import OPS, call_of, overload, stretch
from test_streaming import codes
from torch import Tensor

import dualcodec_ext as dx
from dualcodec_ext import testing
from dualcodec_ext._code_look import CodeInput, CodeLook
from dualcodec_ext._stream_rows import NO_ERROR, Inlet, Rows, copy_runs, later
from dualcodec_ext.steps import UpsampleStep

pytestmark = needs_device


def moved(values: list[Any]) -> list[Any]:
    return [x.to(DEVICE) if isinstance(x, Tensor) else x for x in values]


@by_dtype
@pytest.mark.parametrize("op", OPS)
def test_out_has_the_bits_of_the_plain_op_and_writes_nothing_beside(op: str, dtype: torch.dtype) -> None:
    args, more = call_of(op, dtype)
    args = moved(args)
    expected = overload(op)(*args)
    memory, rows = stretch(expected)
    overload(op).out(*args, **more, out=rows)
    assert torch.equal(rows, expected)
    assert int(memory.isnan().sum()) == memory.numel() - expected.numel()


@by_dtype
@pytest.mark.parametrize("mode, padding", [("transposed", (3, 3)), ("repeat", (9, 0))])
def test_stretches_of_an_upsampling(mode: str, padding: tuple[int, int], dtype: torch.dtype) -> None:
    gen = torch.Generator().manual_seed(3)
    shape = (96, 48) if mode == "transposed" else (48, 96)
    weight, x, alpha = (
        t.to(DEVICE, dtype)
        for t in (
            torch.randn(*shape, 10, generator=gen) / 14,
            torch.randn(2, 20, 96, generator=gen),
            torch.rand(96, generator=gen) + 0.5,
        )
    )
    x, alpha, bias = x.transpose(1, 2), alpha.float(), torch.ones(48, device=DEVICE)
    packed = dx.ops.packing.pack_upsample1d(weight, 5, mode, padding)
    step = UpsampleStep(alpha, weight, packed, bias, 5, mode, padding)
    whole = step(x, None)
    for first, count in ((0, 7), (5, 76), (10, 33)):
        out = torch.empty(2, count, 48, dtype=dtype, device=DEVICE).transpose(1, 2)
        step.into(out, x, first)
        assert torch.equal(out, whole[:, :, first : first + count])
    if DEVICE == "cpu":
        return
    with pytest.raises(ValueError, match="first must be a multiple of stride = 5 on CUDA, got 3"):
        step.into(out, x, 3)
    if mode == "transposed":
        for rows in range(1, 5):
            later(step, rows).into(out, x, 5)
            assert torch.equal(out, whole[:, :, rows + 5 : rows + 38])


def test_a_lookup_that_notes_a_wrong_code() -> None:
    args, _ = call_of("rvq_lookup")
    args, error = moved(args), torch.tensor([NO_ERROR], device=DEVICE)
    expected = overload("rvq_lookup")(*args)
    out = torch.empty_like(expected)
    overload("rvq_lookup").out(*args, error=error, out=out)
    assert torch.equal(out, expected) and int(error) == NO_ERROR
    args[0][1, 0, 7] = 10**9
    overload("rvq_lookup").out(*args, error=error, out=out)
    assert int(error) == args[0][0].numel() + 7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [(48, 16), (3, 5)], ids=str)
def test_contexts_come_and_go(channels: tuple[int, int], dtype: torch.dtype) -> None:
    first, second = channels
    gen = torch.Generator().manual_seed(first)
    numel = 6 * first + 54 * second
    before = torch.randn(4, numel, generator=gen).to(DEVICE, dtype)
    state, error = before.clone(), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    inlets = [Inlet(0, 6, 5, 0, first), Inlet(0, 0, 3, 0, 7), Inlet(6 * first, 54, 2, 3, second)]
    rows = Rows(state, inlets)
    rows.bring(error)
    assert int(error) == NO_ERROR
    for i, at, context, width in ((0, 0, 6, first), (2, 6 * first, 54, second)):
        context_rows = before[:, at : at + context * width].reshape(4, context, width)
        assert torch.equal(rows.whole(i)[:, :, :context].transpose(1, 2), context_rows)
        assert not rows.whole(i)[:, :, context:].any()
        rows.fresh(i).copy_(torch.randn(4, inlets[i].fresh, width, generator=gen).transpose(1, 2))
    kept = torch.tensor([True, False, True, True], device=DEVICE)
    rows.take(kept, torch.zeros_like(error))
    assert torch.equal(state, before), "a code out of range changes nothing"
    rows.take(kept, error)
    assert torch.equal(state[1], before[1])
    for i, at, context, width in ((0, 0, 6, first), (2, 6 * first, 54, second)):
        fresh = inlets[i].fresh
        taken = rows.whole(i)[:, :, fresh : fresh + context].transpose(1, 2).flatten(1)
        assert torch.equal(state[kept][:, at : at + context * width], taken[kept])


def test_more_runs_than_a_launch_takes() -> None:
    source = torch.randn(3, 4000, device=DEVICE)
    to, error = torch.zeros(3, 9000, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    at, begins, counts = [i * 40 for i in range(210)], [i * 16 for i in range(210)], [1 + i % 30 for i in range(210)]
    copy_runs(to, source, at, begins, counts, None, error)
    expected = torch.zeros_like(to)
    for a, b, n in zip(at, begins, counts, strict=True):
        expected[:, a : a + n] = source[:, b : b + n]
    assert torch.equal(to, expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("stages", [0, 7])
def test_codes_on_their_way_to_a_recording(stages: int, dtype: torch.dtype) -> None:
    gen, look = torch.Generator().manual_seed(stages), CodeLook(torch.empty(0, device=DEVICE).device)
    codes = [torch.randint(100, (21, 3, q), generator=gen).to(DEVICE, dtype).permute(1, 2, 0) for q in (1, stages) if q]
    inputs = [CodeInput(torch.full((3, c.shape[1], 24), -5, device=DEVICE), 100) for c in codes]
    for _ in range(2):
        look.take(inputs, codes)
        assert look.fine()
        for given, c in zip(inputs, codes, strict=True):
            assert torch.equal(given.to[..., :21], c.long()) and (given.to[..., 21:] == -5).all()
        for c in codes:
            kept = c[2, -1, 20].clone()
            c[2, -1, 20] = 100
            look.take(inputs, [x.cpu() for x in codes])
            assert not look.fine()
            c[2, -1, 20] = kept


@gpu_alone
def test_memory_that_the_gpu_does_not_see() -> None:
    codes, wrong = torch.zeros(1, 1, 4, dtype=torch.int64, device=DEVICE), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="take_codes: wrong must lie in pinned memory"):
        torch.ops.dualcodec_ext.take_codes(torch.zeros_like(codes), codes, 100, None, None, 0, wrong)


@gpu_alone
def test_slots_masks_and_wrong_codes() -> None:
    """Two streams that take turns have the bits of streams alone, and a code out of range leaves them so."""
    name = "causal decoder"
    model = dx.accelerate(testing.seeded_model(settings_of(name)).cuda())
    semantic, acoustic = (c.cuda() for c in codes(name, 12, batch=2))
    alone = dx.StreamingDecoder(model, 2).step(semantic, acoustic)
    decoder, parts = dx.StreamingDecoder(model, 2), [[], []]
    for at in range(12):
        frame = semantic[..., at : at + 1], acoustic[..., at : at + 1]
        for wrong in (frame[0] + 10**6, frame[0] - 10**6):
            with pytest.raises(ValueError, match=r"StreamingDecoder\.step: semantic_codes must be in"):
                decoder.step(wrong, frame[1])
        assert decoder.frame_counts == [at, at]
        if at % 3 == 0:
            audio = decoder.step(*frame)
            parts[0].append(audio[0].clone())
            parts[1].append(audio[1].clone())
        else:
            for b in (1, 0):
                parts[b].append(decoder.step(*frame, mask=[b == 0, b == 1])[b].clone())
    for b in (0, 1):
        assert torch.equal(torch.cat(parts[b], -1), alone[b])


@gpu_alone
def test_a_step_is_few_kernels() -> None:
    name = "causal decoder"
    model = dx.accelerate(testing.seeded_model(settings_of(name)).cuda(), dtype=torch.bfloat16)
    semantic, acoustic = (c.cuda() for c in codes(name, 12, batch=2))
    decoder = dx.StreamingDecoder(model, 2)
    for at in range(11):
        decoder.step(semantic[..., at : at + 1], acoustic[..., at : at + 1])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        decoder.step(semantic[..., 11:], acoustic[..., 11:])
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert sum("StreamRows" in n for n in names) == 2 and sum("RvqLookup" in n for n in names) == 2, names
    # Besides our own: the codes, in; the audio, out; whether all were in range.
    assert len([n for n in names if "dcx::" not in n]) <= 4, names
