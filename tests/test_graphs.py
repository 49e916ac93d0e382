"""Buckets of recorded decodes and encodes: the same bits as the eager engine, within the memory cap."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import dualcodec_ext as dx
from dualcodec_ext import testing
from dualcodec_ext.engine import Engine
from dualcodec_ext.graphs import MAX_FRAMES, CudaRecorder, Graphs, bucket_frames, memory_cap_bytes

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Repeating:
    """Records on the CPU: a replay runs the function again into the tensors of the first run."""

    def __init__(self, held: int = 1000) -> None:
        self.recorded, self.replayed, self.held = 0, 0, held

    def record(self, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], Any], tuple[Tensor, ...], int]:
        self.recorded += 1
        outputs = run()

        def replay() -> None:
            self.replayed += 1
            for to, value in zip(outputs, run(), strict=True):
                to.copy_(value)

        return replay, outputs, self.held


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(testing.seeded_model(), torch.float32)


def codes_for(engine: Engine, batch: int, frames: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    semantic = torch.randint(engine.semantic_entries, (batch, 1, frames), generator=g)
    return semantic, torch.randint(engine.acoustic_entries, (batch, 2, frames), generator=g)


def test_buckets() -> None:
    assert [bucket_frames(n) for n in (0, 1, 16, 17, 24, 125, 256, 257, MAX_FRAMES, MAX_FRAMES + 1)] == [
        None, 1, 16, 24, 24, 128, 256, 320, MAX_FRAMES, None
    ]  # fmt: skip
    for n in range(1, MAX_FRAMES + 1):
        assert n <= (bucket_frames(n) or 0) <= n + max(7, n // 4)


def test_decode_in_a_bucket_has_the_engines_bits(engine: Engine) -> None:
    recorder = Repeating()
    graphs = Graphs(engine, recorder, 10**9)
    for batch, frames, lengths in ((2, 19, None), (2, 24, None), (2, 20, [20, 7]), (2, 17, [0, 17]), (1, 3, None)):
        semantic, acoustic = codes_for(engine, batch, frames)
        own = None if lengths is None else torch.tensor(lengths)
        rows = None if own is None else engine.decode_lengths(own)
        for stages in (2, 1, 0):
            some = acoustic[:, :stages] if stages else None
            wanted = engine.decode(semantic, some, rows)
            for _ in range(3):
                got = graphs.decode(semantic, some, own)
                assert got.shape == wanted.shape and torch.equal(got, wanted)
    # The bucket of 17 to 24 frames, once more without lengths for 24, and that of 3 frames, each with three numbers of
    # stages.
    assert recorder.recorded == 9


def test_a_length_that_comes_again_and_again_has_a_recording_of_its_own(engine: Engine) -> None:
    recorder = Repeating()
    graphs = Graphs(engine, recorder, 10**9)

    def recorded_after(frames: int, lengths: list[int] | None = None) -> int:
        semantic, acoustic = codes_for(engine, 2, frames)
        own = None if lengths is None else torch.tensor(lengths)
        wanted = engine.decode(semantic, acoustic, None if own is None else engine.decode_lengths(own))
        assert torch.equal(graphs.decode(semantic, acoustic, own), wanted)
        return recorder.recorded

    assert [recorded_after(n) for n in (19, 20, 19, 19, 20, 19, 19)] == [0, 1, 1, 1, 1, 1, 1]  # never thrice in a row
    assert [recorded_after(19) for _ in range(3)] == [1, 2, 2]
    assert recorded_after(19, [19, 4]) == 2 and recorded_after(20) == 2
    assert len(graphs._recordings) == 2 and recorder.replayed >= 10


def test_the_two_recordings_of_a_bucket_cost_nobody_theirs(engine: Engine) -> None:
    """Where the cap holds one, the bucket's serves calls that would have one of their own."""
    for first, then in ((None, [24, 7]), ([24, 7], None)):
        recorder = Repeating(held=100_000)
        graphs = Graphs(engine, recorder, 150_000)
        semantic, acoustic = codes_for(engine, 2, 24)
        for lengths in [first, first, then, then] + [first, then] * 4:
            own = None if lengths is None else torch.tensor(lengths)
            wanted = engine.decode(semantic, acoustic, None if own is None else engine.decode_lengths(own))
            assert torch.equal(graphs.decode(semantic, acoustic, own), wanted)
        assert recorder.recorded <= 2 and len(graphs._recordings) == 1 and recorder.replayed >= 8
    recorder = Repeating(held=200_000)
    graphs = Graphs(engine, recorder, 150_000)
    for lengths in [None, None, None, [24, 7], [24, 7], [24, 7]]:
        graphs.decode(semantic, acoustic, None if lengths is None else torch.tensor(lengths))
    assert recorder.recorded == 1 and not graphs._recordings  # too large the one way is too large the other


def test_encode_in_a_bucket_has_the_engines_bits(engine: Engine) -> None:
    recorder = Repeating()
    graphs = Graphs(engine, recorder, 10**9)
    hop = engine.hop_samples
    for frames, feature_frames in ((19, 19), (20, 18), (17, 17)):
        g = torch.Generator().manual_seed(frames)
        audio = torch.randn(2, 1, frames * hop, generator=g) * 0.3
        features = torch.randn(2, testing.TINY["semantic_dim"], feature_frames, generator=g)
        for quantizers in (None, 1):
            wanted = engine.encode(audio, features, quantizers, None)
            for _ in range(6):  # the last ones by a recording without lengths
                got = graphs.encode(audio, features, quantizers, None, None)
                assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
        alone = graphs.encode(None, features, None, None, None)
        assert torch.equal(alone[0], wanted[0]) and alone[1] is None
        own = torch.tensor([feature_frames, 5])
        rows = engine.encode_lengths(own, own * hop)
        wanted = engine.encode(audio, features, None, rows)
        got = graphs.encode(audio, features, None, own, own * hop)
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    # The bucket with both numbers of codebooks, without audio, and the two whole lengths once more without lengths.
    assert recorder.recorded == 3 + 2 * 2


def test_results_are_the_callers_own(engine: Engine) -> None:
    graphs = Graphs(engine, Repeating(), 10**9)
    first, second = codes_for(engine, 1, 5, seed=1), codes_for(engine, 1, 5, seed=2)
    graphs.decode(*first, None)
    kept = graphs.decode(*first, None)
    before = kept.clone()
    graphs.decode(*second, None)
    assert torch.equal(kept, before)


def test_codes_out_of_range_raise_from_a_replay_too(engine: Engine) -> None:
    graphs = Graphs(engine, Repeating(), 10**9)
    semantic, acoustic = codes_for(engine, 1, 6)
    for _ in range(3):
        graphs.decode(semantic, acoustic, None)
    wrong = acoustic.clone()
    wrong[0, 1, 4] = engine.acoustic_entries
    with pytest.raises(ValueError, match=r"rvq_lookup: codes must be in \[0, \d+\), got \d+ at .* stage 1, frame 4"):
        graphs.decode(semantic, wrong, None)
    # Behind an item's end nobody looks at the codes.
    cut = torch.tensor([4])
    for _ in range(3):
        graphs.decode(semantic, acoustic, cut)
    assert torch.equal(graphs.decode(semantic, wrong, cut), engine.decode(semantic, wrong, engine.decode_lengths(cut)))
    graphs.decode(semantic, acoustic, None)


def recorded_model(recorder: Repeating) -> tuple[Any, Tensor, Tensor]:
    """A model that has recorded the decode of these codes."""
    model = dx.accelerate(testing.seeded_model())
    model.prepare()
    assert model._engine_state is not None
    graphs = model._engine_state[1]
    graphs.recorder = recorder
    semantic, acoustic = codes_for(graphs.engine, 1, 5)
    for _ in range(2):
        model.decode_from_codes(semantic, acoustic)
    return model, semantic, acoustic


def test_a_replay_of_old_weights_is_dropped() -> None:
    recorder = Repeating()
    model, semantic, acoustic = recorded_model(recorder)
    assert (recorder.recorded, recorder.replayed) == (1, 1)
    before, graphs = model.decode_from_codes(semantic, acoustic), model._engine_state[1]
    assert recorder.replayed == 2
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    after = model.decode_from_codes(semantic, acoustic)
    assert recorder.replayed == 3 and model._engine_state[1] is not graphs
    assert not torch.equal(after, before)
    assert torch.equal(after, Engine(model, torch.float32).decode(semantic, acoustic, None))


def test_codes_of_a_shape_seen_before_start_their_recording_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Repeating()
    model, semantic, acoustic = recorded_model(recorder)
    graphs = model._engine_state[1]
    shapes = [(1, 5), (2, 5), (1, 8)]
    for batch, frames in shapes[1:]:
        for _ in range(2):
            model.decode_from_codes(*codes_for(graphs.engine, batch, frames))
    for _ in range(2):
        model.decode_from_codes(semantic, None)

    def fail(*args: Any) -> None:
        raise AssertionError("there was more to find out")

    monkeypatch.setattr(graphs, "replay_decode", fail)
    before = recorder.replayed
    for seed, (batch, frames) in enumerate(2 * shapes):
        codes = codes_for(graphs.engine, batch, frames, seed)
        assert torch.equal(model.decode_from_codes(*codes), graphs.engine.decode(*codes, None))
    assert torch.equal(model.decode_from_codes(semantic), graphs.engine.decode(semantic, None, None))
    assert recorder.replayed == before + 7
    for other in ((semantic.int(), acoustic), (semantic, acoustic[:, :1]), (semantic[..., :4], acoustic[..., :4])):
        with pytest.raises(AssertionError, match="more to find out"):
            model.decode_from_codes(*other)
    with pytest.raises(AssertionError, match="more to find out"):
        model.decode_from_codes(semantic, acoustic, lengths=torch.tensor([5]))
    with pytest.raises(ValueError, match="semantic_codes must be"):
        model.decode_from_codes(None, acoustic)


def test_a_recording_made_in_inference_mode_serves_calls_outside_of_it() -> None:
    with torch.inference_mode():
        model, semantic, acoustic = recorded_model(Repeating())
    wanted = Engine(model, torch.float32).decode(semantic, acoustic, None)
    assert torch.equal(model.decode_from_codes(semantic, acoustic), wanted)


def test_no_replay_where_the_reference_is_to_run() -> None:
    recorder = Repeating()
    model, semantic, acoustic = recorded_model(recorder)
    with dx.backend("reference"):
        model.decode_from_codes(semantic, acoustic)
    assert recorder.replayed == 1
    model.release()
    model.decode_from_codes(semantic, acoustic)
    assert recorder.replayed == 2


def test_a_models_replay_names_a_wrong_code() -> None:
    model, semantic, acoustic = recorded_model(Repeating())
    for value in (-1, model._engine_state[1].engine.acoustic_entries):
        wrong = acoustic.clone()
        wrong[0, 1, 4] = value
        with pytest.raises(ValueError, match=rf"acoustic_codes must be in \[0, \d+\), got {value} at"):
            model.decode_from_codes(semantic, wrong)


def test_the_cap_drops_what_was_used_longest_ago(engine: Engine) -> None:
    recorder = Repeating(held=1000)
    graphs = Graphs(engine, recorder, 4000)
    for frames in (1, 2, 3, 4):
        for _ in range(2):
            graphs.decode(*codes_for(engine, 1, frames), None)
    assert recorder.recorded == 4 and 2000 < graphs.held_bytes() <= 4000
    graphs.decode(*codes_for(engine, 1, 4), None)
    assert recorder.recorded == 4
    graphs.decode(*codes_for(engine, 1, 1), None)  # dropped before, recorded again
    assert recorder.recorded == 5
    large = Graphs(engine, Repeating(held=9000), 5000)
    for _ in range(3):
        large.decode(*codes_for(engine, 1, 2), None)
    assert large.held_bytes() == 0 and large.recorder.recorded == 1  # type: ignore[attr-defined]
    off = Graphs(engine, Repeating(), 0)
    for _ in range(3):
        off.decode(*codes_for(engine, 1, 2), None)
    assert off.recorder.recorded == 0  # type: ignore[attr-defined]


def test_the_caps_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUALCODEC_EXT_GRAPH_MIB", "7")
    assert memory_cap_bytes() == 7 * 2**20
    monkeypatch.setenv("DUALCODEC_EXT_GRAPH_MIB", "lots")
    with pytest.raises(dx.DualCodecError, match="DUALCODEC_EXT_GRAPH_MIB must be a number of MiB, got 'lots'"):
        memory_cap_bytes()


@CUDA
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_cuda_graphs_have_the_eager_bits(dtype: torch.dtype) -> None:
    model = testing.seeded_model().cuda()
    engine = Engine(model, dtype)
    graphs = Graphs(engine, CudaRecorder(), 2**30)
    for batch, frames in ((1, 1), (3, 20), (1, 125)):
        codes = [c.cuda() for c in codes_for(engine, batch, frames)]
        wanted = engine.decode(*codes, None)
        for _ in range(3):
            assert torch.equal(graphs.decode(*codes, None), wanted)


@CUDA
def test_a_decode_does_not_wait_for_its_audio() -> None:
    """Calls in a row keep the GPU at work, and each still tells of its own codes."""
    model = testing.seeded_model().cuda()
    graphs = Graphs(Engine(model, torch.bfloat16), CudaRecorder(), 2**30)
    codes = [c.cuda() for c in codes_for(graphs.engine, 64, 1000)]
    wanted = graphs.engine.decode(*codes, None)
    for _ in range(2):
        graphs.decode(*codes, None)
    torch.cuda.synchronize()
    made = [graphs.decode(*codes, None) for _ in range(3)]
    assert not torch.cuda.current_stream().query(), "three decodes had ended before the last call returned"
    assert all(torch.equal(audio, wanted) for audio in made)
    for at in (0, 63):
        wrong = codes[0].clone()
        wrong[at, 0, 999] = graphs.engine.semantic_entries
        with pytest.raises(ValueError, match=f"codes must be in .* at batch {at}, stage 0, frame 999"):
            graphs.decode(wrong, codes[1], None)
        assert torch.equal(graphs.decode(*codes, None), wanted)


@CUDA
def test_threads_that_decode_at_once_on_a_gpu() -> None:
    engine = Engine(testing.seeded_model().cuda(), torch.bfloat16)
    graphs = Graphs(engine, CudaRecorder(), 2**30)
    calls = [[c.cuda() for c in codes_for(engine, 2, 24, seed)] for seed in range(4)]
    wanted = [engine.decode(*codes, None) for codes in calls]
    wrong = [calls[0][0] + engine.semantic_entries, calls[0][1]]
    for _ in range(2):
        graphs.decode(*calls[0], None)

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for at in range(20):
                assert torch.equal(graphs.decode(*calls[i], None), wanted[i])
                if i == 0 and at % 5 == 0:
                    with pytest.raises(ValueError, match="codes must be in"):
                        graphs.decode(*wrong, None)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
