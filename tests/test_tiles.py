"""Encode and decode in time tiles: the bits of whole tensors for any size of tile, in memory that does not grow."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import ODD
from torch import Tensor

from bench.machine import peak_extra_bytes
from dualcodec_ext import testing
from dualcodec_ext._pool import KEPT_BYTES, Pool
from dualcodec_ext.engine import Engine
from dualcodec_ext.forms import Form
from dualcodec_ext.pipeline import Node, Output
from dualcodec_ext.stages import Stage, UnitStage, UpsampleStage
from dualcodec_ext.steps import ResidualUnitStep, UpsampleStep
from dualcodec_ext.tiles import DecodeTiles, Sizes

# No deadline: a shared machine may take any time over one example, and a timing decides nothing.
drawn = settings(max_examples=40, deadline=None, derandomize=True)
KINDS = [name for name in ODD if name not in ("distill", "one codebook")]


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@functools.cache
def engine(name: str, dtype: torch.dtype = torch.float32, form: Form = "exact") -> Engine:
    """Of a model with residual units in the form and, as they are narrow, direct ones."""
    return Engine(testing.seeded_model({**testing.TINY, **ODD[name]}), dtype, form=form)


def codes(engine: Engine, batch: int, frames: int, stages: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(batch * 1000 + frames)
    semantic = torch.randint(engine.semantic_entries, (batch, 1, frames), generator=g)
    return semantic, torch.randint(engine.acoustic_entries, (batch, stages, frames), generator=g)


def equal(found: Any, wanted: Any) -> bool:
    return all(a is b is None or torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


sizes = st.builds(
    Sizes,
    pass_bytes=st.integers(1, 40_000),
    fewest_rows=st.integers(1, 60),
    group_frames=st.integers(1, 100),
    gather=st.floats(0, 1),
    heavy_bytes=st.sampled_from([0, 5000]),
)


@drawn
@given(st.sampled_from(KINDS), sizes, st.integers(0, 70), st.integers(0, 4), st.booleans(), st.data())
def test_decode(name: str, size: Sizes, frames: int, batch: int, acoustic: bool, data: Any) -> None:
    made = engine(name)
    semantic, some = codes(made, batch, frames)
    rows = own = None
    if data.draw(st.booleans(), "with lengths"):
        own = torch.tensor(data.draw(st.lists(st.integers(0, frames), min_size=batch, max_size=batch)))
        own = own.to(torch.int64)
        rows = made.decode_lengths(own)
    made.set_tiles(size)
    wanted = made.decode(semantic, some if acoustic else None, rows)
    for _ in range(2):  # the second time in memory that has been used
        assert torch.equal(made.decode_clips(semantic, some if acoustic else None, own), wanted)


@drawn
@given(st.sampled_from(KINDS), sizes, st.integers(0, 50), st.integers(0, 3), st.integers(0, 3), st.data())
def test_encode(name: str, size: Sizes, frames: int, batch: int, stages: int, data: Any) -> None:
    made = engine(name)
    hop = made.hop_samples
    short = data.draw(st.integers(0, min(2, frames)), "frames of features that are missing")
    samples = max(0, frames * hop - data.draw(st.integers(0, hop - 1)))
    audio = testing.make_speech(samples, batch, seed=frames)
    features = testing.make_features(frames - short, batch, 20, seed=frames)
    whole = torch.nn.functional.pad(audio, (0, -samples % hop))
    own = rows = frame_lengths = None
    if data.draw(st.booleans(), "with lengths"):
        own = torch.tensor(data.draw(st.lists(st.integers(0, samples), min_size=batch, max_size=batch)))
        own = own.to(torch.int64)
        ceiled = (own + hop - 1) // hop
        frame_lengths = ceiled.clamp(max=frames - short)
        for b, n in enumerate(own.tolist()):
            whole[b, :, n:] = 0
            audio[b, :, n:] = torch.nan
        rows = made.encode_lengths(frame_lengths, ceiled * hop if stages else None)
    wanted = made.encode(whole if stages else None, features, stages or None, rows)
    made.set_tiles(size)
    given_audio, lengths = (audio, own) if stages else (None, None)
    for _ in range(2):
        assert equal(made.encode_clips(given_audio, features, stages or None, frame_lengths, lengths), wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    made = engine("tiny", dtype)
    made.set_tiles(Sizes(pass_bytes=2000, fewest_rows=5))
    semantic, acoustic = codes(made, 2, 40)
    found = made.decode_clips(semantic, acoustic, None)
    assert found.dtype == dtype and torch.equal(found, made.decode(semantic, acoustic, None))
    audio, features = testing.make_speech(1200, 2).to(dtype), testing.make_features(40, 2, 20).to(dtype)
    assert equal(made.encode_clips(audio, features, None, None, None), made.encode(audio, features, None, None))


def test_layouts_of_the_inputs() -> None:
    made = engine("tiny")
    audio, features = testing.make_speech(1200, 2).double(), testing.make_features(40, 2, 20).bfloat16()
    wanted = made.encode(audio, features, None, None)
    for x, y in zip(testing.strided_copies(audio).values(), testing.strided_copies(features).values(), strict=True):
        assert equal(made.encode_clips(x, y, None, None, None), wanted)
    semantic, acoustic = codes(made, 2, 40)
    sliced = torch.stack([acoustic, acoustic], -1).int()[..., 0]
    assert torch.equal(made.decode_clips(semantic, sliced, None), made.decode(semantic, acoustic, None))


@pytest.mark.parametrize("form", ["exact", "fast"])
def test_groups_of_steps(form: Form) -> None:
    """A unit that computes its steps in groups is asked for whole ones, counted from the clip's first step."""
    asked: list[tuple[int, int, int]] = []

    def watch(stage: Stage) -> None:
        run = stage.run

        def watched(x: Tensor, begin: int, out: Tensor, o: int) -> None:
            asked.append((stage.granularity, o, out.shape[2]))
            run(x, begin, out, o)

        stage.run = watched  # type: ignore[method-assign]

    made = Engine(testing.seeded_model({**testing.TINY, "decoder_dim": 256}), torch.float32, form=form)
    units = {step.granularity for step in made._decoder if isinstance(step, ResidualUnitStep | UpsampleStep)}
    assert units == {"exact": {4, 12, 36}, "fast": {12, 36, 108}}[form] | {6, 9, 15}
    semantic, acoustic = codes(made, 1, 37)
    wanted = made.decode(semantic, acoustic, None)
    for size in (None, Sizes(pass_bytes=1, fewest_rows=1), Sizes(pass_bytes=3000, fewest_rows=7, gather=0)):
        made.set_tiles(size)
        tiles = DecodeTiles(made.tiles.programs, made.tiles.sizes, 1, 3)
        for node in tiles.pipeline.nodes:
            if isinstance(node.stage, UnitStage | UpsampleStage):
                watch(node.stage)
        audio = torch.empty_like(wanted)
        tiles.start(Output(audio))
        for at in range(0, 37, 5):
            tiles.write(semantic[..., at : at + 5], acoustic[..., at : at + 5], at)
        tiles.finish()
        assert torch.equal(audio, wanted)
    assert {unit for unit, _, _ in asked} == units
    assert all(o % unit == 0 for unit, o, _ in asked)
    # Three blocks of four in each of three runs; every stage ends once, and may then compute a part of a group.
    assert 0 < sum(count % unit > 0 for unit, _, count in asked) <= 3 * 3 * 4


def test_frame_by_frame() -> None:
    """A direct causal decoder gives a frame's samples with the frame; the parts have the bits of the whole."""
    made = engine("causal decoder", form="direct")
    semantic, acoustic = codes(made, 2, 30)
    wanted = made.decode(semantic, acoustic, None)
    tiles = DecodeTiles(made.tiles.programs, Sizes(gather=0), 2, 1)
    audio = torch.empty_like(wanted)
    outlet = Output(audio)
    tiles.start(outlet)
    for f in range(30):
        tiles.write(semantic[..., f : f + 1], acoustic[..., f : f + 1], f)
        assert outlet.end == (f + 1) * made.hop_samples
    assert torch.equal(audio, wanted)


def test_a_steady_step_allocates_next_to_nothing() -> None:
    """The largest piece of memory that a frame allocates, once every buffer is there."""
    made = engine("causal decoder", form="direct")
    semantic, acoustic = codes(made, 1, 64)
    tiles = DecodeTiles(made.tiles.programs, Sizes(gather=0), 1, 1)
    tiles.start(Output(torch.empty(1, 1, 64 * made.hop_samples)))

    def step(f: int) -> None:
        tiles.write(semantic[..., f : f + 1], acoustic[..., f : f + 1], f)

    def largest(call: Any) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            call()
        return max(abs(event.cpu_memory_usage) for event in profile.events())

    for f in range(60):
        step(f)
    assert largest(lambda: step(60)) <= 1024
    assert largest(lambda: made.decode(semantic, acoustic, None)) > 1024  # it sees what there is


# Memory


def narrow() -> Engine:
    """As the released models are built, but with few channels: minutes of audio take seconds."""
    rates = (4, 5, 6, 8, 2)
    settings = {**testing.TINY, "encoder_rates": rates, "decoder_rates": rates[::-1], "encoder_dim": 2}
    return Engine(testing.seeded_model({**settings, "decoder_dim": 64, "latent_dim": 32}), torch.float32)


def test_memory_does_not_grow_with_the_length() -> None:
    made = narrow()
    made.set_tiles(Sizes(pass_bytes=2**18))
    frames = 1500  # two minutes
    semantic, acoustic = codes(made, 1, frames)
    audio = torch.zeros(1, 1, frames * made.hop_samples - 7)
    features = testing.make_features(frames, 1, 20)
    result = made.decode_clips(semantic, acoustic, None)
    result_bytes = result.numel() * 4
    limit = 16 * 2**20

    def beyond(call: Any) -> int:
        peak = peak_extra_bytes(call)
        if peak is None:
            pytest.skip("resident memory can't be read here")
        return peak

    assert beyond(lambda: made.decode_clips(semantic, acoustic, None)) - result_bytes < limit
    assert beyond(lambda: made.encode_clips(audio, features, None, None, None)) < limit
    assert beyond(lambda: made.decode(semantic, acoustic, None)) - result_bytes > limit
    whole = torch.zeros(1, 1, frames * made.hop_samples)
    assert beyond(lambda: made.encode(whole, features, None, None)) > limit


def test_workspaces_are_used_again_and_few_are_kept() -> None:
    made: list[Any] = []

    class Workspace:
        def __init__(self, batch: int, frames: int) -> None:
            self.batch, self.frames = batch, frames
            made.append(self)

        def bytes(self) -> int:
            return 10 * self.frames

    pool = Pool(Workspace, cap_bytes=1000)
    first = pool.take(1, 33)
    assert first.frames == 64
    pool.give(first)
    assert pool.take(1, 5) is first, "a larger one will do"
    second = pool.take(1, 5)
    assert second.frames == 8 and len(made) == 2, "never two calls in one"
    pool.give(first)
    pool.give(second)
    assert pool.take(1, 8) is second, "the smallest that fits"
    pool.give(second)
    assert pool.take(2, 8) not in (first, second)
    assert pool.held_bytes() == 720
    pool.give(pool._make(1, 32))
    assert pool.held_bytes() == 400 and first not in pool._idle, "the one given back longest ago has gone"
    pool.give(pool._make(1, 128))
    assert pool.held_bytes() == 0


def test_what_an_engine_keeps() -> None:
    made = engine("tiny")
    made.set_tiles(None)
    before = made.weight_bytes()
    made.decode_clips(*codes(made, 2, 30), None)
    held = made.tiles.held_bytes()
    assert 0 < held <= KEPT_BYTES
    made.decode_clips(*codes(made, 2, 25), None)
    assert made.tiles.held_bytes() == held
    assert made.weight_bytes() == before


def test_light_weights_go_through_small_workspaces() -> None:
    made = engine("tiny")
    made.set_tiles(None)
    assert made.tiles.piece_frames(1500) < 1500 and made.tiles.piece_frames(5) == 5
    made.set_tiles(Sizes(heavy_bytes=1))
    assert made.tiles.piece_frames(1500) == 1500


def test_threads_at_once() -> None:
    made = engine("tiny")
    inputs = [codes(made, 2, 20 + i) for i in range(8)]
    wanted = [made.decode(*pair, None) for pair in inputs]
    found: list[Any] = [None] * 8

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                found[i] = made.decode_clips(*inputs[i], None)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal(found, wanted)


def test_memory_made_under_inference_mode_serves_outside_of_it() -> None:
    made = engine("tiny")
    made.set_tiles(None)
    pair = codes(made, 1, 20)
    with torch.inference_mode():
        wanted = made.decode_clips(*pair, None)
    assert torch.equal(made.decode_clips(*pair, None), wanted)
    with torch.inference_mode():
        assert torch.equal(made.decode_clips(*pair, None), wanted)


def test_a_code_out_of_range_is_named_by_its_place_in_the_call() -> None:
    made = engine("tiny")
    made.set_tiles(Sizes(fewest_rows=4, group_frames=1))
    semantic, acoustic = codes(made, 3, 50)
    acoustic[1, 2, 40] = made.acoustic_entries
    with pytest.raises(ValueError, match=r"codes must be in \[0, 33\), got 33 at batch 1, stage 2, frame 40"):
        made.decode_clips(semantic, acoustic, None)
    own = torch.tensor([50, 40, 50])
    rows = made.decode_lengths(own)
    assert torch.equal(made.decode_clips(semantic, acoustic, own), made.decode(semantic, acoustic, rows))


def test_nodes_wait_for_a_full_pass_where_weights_are_heavy() -> None:
    made = engine("tiny", form="direct")
    tiles = DecodeTiles(made.tiles.programs, Sizes(fewest_rows=8, gather=0.5, heavy_bytes=0), 1, 64)
    assert [n.plan.least for n in tiles.pipeline.nodes] == [n.plan.most // 2 for n in tiles.pipeline.nodes]
    node = tiles.pipeline.nodes[0]
    assert isinstance(node, Node)
    tiles.start(Output(torch.empty(1, 1, 64 * made.hop_samples)))
    semantic, acoustic = codes(made, 1, 64)
    tiles.write(semantic[..., :1], acoustic)
    assert node.emitted == 0 or node.plan.least == 1
