"""Calls that start a recording before anything else is looked at: the same bits, and nothing missed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from gpu import gpu_alone, needs_device
from test_model import settings_of
from test_streaming import codes
from torch import Tensor

import dualcodec_ext as dx
from dualcodec_ext import testing
from dualcodec_ext.graphs import Graphs

pytestmark = [needs_device, gpu_alone]


@pytest.fixture
def model() -> dx.DualCodec:
    return dx.accelerate(testing.seeded_model().cuda(), dtype=torch.bfloat16)


def drawn(model: dx.DualCodec, batch: int, frames: int, seed: int = 0, stages: int = 2) -> tuple[Tensor, Tensor | None]:
    engine, g = model._engine().engine, torch.Generator().manual_seed(seed)
    semantic = torch.randint(engine.semantic_entries, (batch, 1, frames), generator=g).cuda()
    acoustic = torch.randint(engine.acoustic_entries, (batch, 2, frames), generator=g).cuda()
    return semantic, acoustic[:, :stages] if stages else None


def alone(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a decode is started again, or fails."""

    def fail(*args: Any) -> None:
        raise AssertionError("a decode was not started again")

    monkeypatch.setattr(graphs, "replay_decode", fail)
    monkeypatch.setattr(graphs, "decode", fail)


@pytest.mark.parametrize("stages", [2, 1, 0])
@pytest.mark.parametrize("batch, frames", [(1, 1), (3, 16), (2, 24)])
def test_the_bits_of_the_eager_engine(
    model: dx.DualCodec, batch: int, frames: int, stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        model.decode_from_codes(*drawn(model, batch, frames, 0, stages))
    graphs = model._engine()
    alone(graphs, monkeypatch)
    held = [model.decode_from_codes(*drawn(model, batch, frames, seed, stages)) for seed in range(4)]
    for seed, audio in enumerate(held):
        wanted = graphs.engine.decode(*drawn(model, batch, frames, seed, stages), None)
        assert torch.equal(audio, wanted) and audio.shape == wanted.shape and audio.stride() == wanted.stride()
    semantic, acoustic = drawn(model, batch, frames, 9, stages)
    laid = semantic.permute(2, 0, 1).contiguous().permute(1, 2, 0)  # any strides
    wanted = graphs.engine.decode(semantic, acoustic, None)
    assert torch.equal(model.decode_from_codes(laid, acoustic), wanted)


def test_what_is_left_to_others(model: dx.DualCodec) -> None:
    """Codes of another type, place or shape, wrong ones, and a capture under way."""
    semantic, acoustic = drawn(model, 2, 16)
    wanted = model._engine().engine.decode(semantic, acoustic, None)
    for _ in range(3):
        assert torch.equal(model.decode_from_codes(semantic, acoustic), wanted)
    graphs = model._engine()
    assert graphs.decode_again(semantic, acoustic, lambda: True) is not None
    for other in (semantic.int(), semantic.cpu(), semantic[..., :15], semantic[:1], semantic[:, 0]):
        assert graphs.decode_again(other, acoustic, lambda: True) is None
    assert graphs.decode_again(semantic, None, lambda: True) is None
    assert graphs.decode_again(semantic, acoustic[:, :1], lambda: True) is None
    assert graphs.decode_again(semantic, acoustic, lambda: False) is None
    assert torch.equal(model.decode_from_codes(semantic.int(), acoustic.cpu()), wanted)
    with dx.backend("reference"):
        assert graphs.decode_again(semantic, acoustic, lambda: True) is None
    for value in (-1, graphs.engine.acoustic_entries):
        wrong = acoustic.clone()
        wrong[1, 1, 15] = value
        with pytest.raises(ValueError, match=rf"acoustic_codes must be in \[0, \d+\), got {value} at batch 1"):
            model.decode_from_codes(semantic, wrong)
        assert torch.equal(model.decode_from_codes(semantic, acoustic), wanted)
    for given in (None, [1, 2], semantic.float()):
        with pytest.raises(ValueError, match="semantic_codes must be"):
            model.decode_from_codes(given, acoustic)  # type: ignore[arg-type]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert graphs.decode_again(semantic, acoustic, lambda: True) is None


def test_calls_outside_of_inference_mode_behind_those_inside(model: dx.DualCodec) -> None:
    with torch.inference_mode():
        semantic, acoustic = drawn(model, 1, 8)
        for _ in range(3):
            wanted = model.decode_from_codes(semantic, acoustic)
    semantic, acoustic = semantic.clone(), acoustic.clone()
    for given in (semantic, semantic.int()):
        assert torch.equal(model.decode_from_codes(given, acoustic), wanted)
    with pytest.raises(ValueError, match="semantic_codes must be in"):
        model.decode_from_codes(semantic - 10**6, acoustic)


def test_what_is_refused_once_the_gpu_works(model: dx.DualCodec) -> None:
    """A backend that can't run, and answers that are dropped on another stream: nothing of them is left."""
    semantic, acoustic = drawn(model, 2, 16)
    wanted = model._engine().engine.decode(semantic, acoustic, None)
    graphs = model._engine()
    for _ in range(3):
        assert torch.equal(model.decode_from_codes(semantic, acoustic), wanted)
    looks = len(graphs._looks)
    for _ in range(3):
        with dx.backend("cpu"), pytest.raises(dx.BackendError):
            model.decode_from_codes(semantic, acoustic)
        with torch.cuda.stream(torch.cuda.Stream()):
            assert graphs.decode_again(semantic - 10**6, acoustic, lambda: False) is None
        assert torch.equal(model.decode_from_codes(semantic, acoustic), wanted)
    assert len(graphs._looks) == looks == 1
    model.release()
    assert torch.equal(model.decode_from_codes(semantic, acoustic), wanted)


def test_weights_that_change(model: dx.DualCodec) -> None:
    semantic, acoustic = drawn(model, 1, 8)
    before = [model.decode_from_codes(semantic, acoustic) for _ in range(3)][-1]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    after = model.decode_from_codes(semantic, acoustic)
    assert not torch.equal(after, before)
    assert torch.equal(after, model._engine().engine.decode(semantic, acoustic, None))


def test_streams_in_turn_and_threads_at_once(model: dx.DualCodec) -> None:
    """A use of a recording waits for the last one, on whatever stream and by whichever way that was."""
    calls = [drawn(model, 2, 16, seed) for seed in range(4)]
    wanted = [model._engine().engine.decode(*call, None) for call in calls]
    for _ in range(3):
        model.decode_from_codes(*calls[0])
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    made: list[tuple[int, Tensor]] = []
    for at in range(60):
        i = at % 4
        with torch.cuda.stream(streams[at % 3]):
            semantic = calls[i][0].int() if at % 5 == 0 else calls[i][0]
            made.append((i, model.decode_from_codes(semantic, calls[i][1])))
    torch.cuda.synchronize()
    assert all(torch.equal(audio, wanted[i]) for i, audio in made)

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(25):
                assert torch.equal(model.decode_from_codes(*calls[i]), wanted[i])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))


def test_recordings_that_the_cap_drops(model: dx.DualCodec) -> None:
    graphs = model._engine()
    for frames in (1, 2, 3, 1, 2, 3):
        for _ in range(3):
            codes = drawn(model, 1, frames)
            audio = model.decode_from_codes(*codes)
            assert torch.equal(audio, graphs.engine.decode(*codes, None))
            graphs.cap_bytes = max(r.bytes for r in graphs._recordings.values()) if graphs._recordings else 2**30
    assert len(graphs._again) == len(graphs._recordings) == 1


@pytest.mark.parametrize("batch", [1, 3])
def test_steps_of_streams(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps with and without `out` and masks, and wrong codes in between: the bits of one step for all frames."""
    model = dx.accelerate(testing.seeded_model(settings_of("causal decoder")).cuda())
    semantic, acoustic = (c.cuda() for c in codes("causal decoder", 24, batch=batch))
    whole = dx.StreamingDecoder(model, batch, max_frames=8)
    wanted = whole.step(semantic, acoustic)
    decoder, hop, parts = dx.StreamingDecoder(model, batch), model.dac.hop_length, list[Tensor]()
    checked = decoder._step
    slow: list[int] = []

    def count(*args: Any) -> Tensor:
        slow.append(at)
        return checked(*args)

    monkeypatch.setattr(decoder, "_step", count)
    for at in range(24):
        frame = semantic[..., at : at + 1], acoustic[..., at : at + 1]
        out = torch.full((batch, 1, hop), 7.0, device="cuda") if at % 3 == 0 else None
        if at in (10, 17):
            with pytest.raises(ValueError, match=r"StreamingDecoder\.step: acoustic_codes must be in"):
                decoder.step(frame[0], frame[1] + 10**6)
        if at == 12:
            audio = decoder.step(frame[0].int(), frame[1].cpu())
        elif at == 14:
            audio = decoder.step(*frame, mask=[True] * batch)
        else:
            audio = decoder.step(*frame, out=out)
            assert out is None or audio.data_ptr() == out.data_ptr()
        assert decoder.sample_counts == [hop] * batch and decoder.frame_counts == [at + 1] * batch
        assert audio.stride() == (hop, hop, 1)
        parts.append(audio.clone())
    assert torch.equal(torch.cat(parts, -1), wanted)
    assert slow == [0, 10, 12, 14, 17]
    at = 24
    kept, on_host = decoder.state_dict(), torch.empty(batch, 1, hop)
    on_device = decoder.step(semantic[..., :1], acoustic[..., :1]).cpu()
    decoder.load_state_dict(kept)
    assert decoder.step(semantic[..., :1], acoustic[..., :1], out=on_host) is on_host
    assert torch.equal(on_host, on_device)
    with pytest.raises(dx.DualCodecError, match="out must be"):
        decoder.step(semantic[..., :1], acoustic[..., :1], out=torch.empty(batch, 1, hop - 1, device="cuda"))
    if batch > 1:  # one slot takes part, then all again
        mask = [True] + [False] * (batch - 1)
        decoder.reset()
        decoder.step(semantic[..., :1], acoustic[..., :1])
        decoder.step(semantic[..., 1:2], acoustic[..., 1:2], mask=mask)
        decoder.reset_slots([0])
        decoder.step(semantic[..., :1], acoustic[..., :1], mask=mask)
        audio = decoder.step(semantic[..., 1:2], acoustic[..., 1:2])
        assert torch.equal(audio, wanted[..., hop : 2 * hop])
