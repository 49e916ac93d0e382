"""Streams: the pieces are the whole clip's samples, whatever the cut, the neighbours and the batch."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import ODD, PRESETS, settings_of
from tolerances import F32, TOLERANCE
from torch import Tensor

import dualcodec_ext as dx
from dualcodec_ext import testing
from dualcodec_ext.steps import ResidualUnitStep

# No deadline: a shared machine may take any time over one example, and a timing decides nothing.
drawn = settings(max_examples=50, deadline=None, derandomize=True)
KINDS = [name for name in ODD if name != "distill"]
BUNDLED = "preset tiny"  # with its trained weights; "tiny" is a narrow model
LOOKAHEAD = {"12hz_v1": 27, "25hz_v1": 10, "12hz_causal": 0, "12hz_lookahead": 2, "12hz_stream": 0}


@functools.cache
def model(name: str, dtype: torch.dtype = torch.float32) -> dx.DualCodec:
    if name == BUNDLED:
        return dx.DualCodec.from_pretrained("tiny").eval()
    return dx.accelerate(testing.seeded_model(settings_of(name)), dtype=dtype)


@functools.cache
def exact(name: str) -> Any:
    return testing.seeded_model(settings_of(name)).double()


def codes(name: str, frames: int, seed: int = 0, batch: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1000 * seed + frames)
    s = model(name).settings
    semantic = torch.randint(s["semantic_codebook_size"], (batch, 1, frames), generator=g)
    return semantic, torch.randint(s["codebook_size"], (batch, s["n_codebooks"], frames), generator=g)


def alone(name: str, semantic: Tensor, acoustic: Tensor | None, **how: Any) -> Tensor:
    """One clip through a decoder of its own, in one step."""
    decoder = dx.StreamingDecoder(model(name), **how)
    return torch.cat([decoder.step(semantic, acoustic), decoder.flush()], -1)


def check_whole(name: str, audio: Tensor, semantic: Tensor, acoustic: Tensor | None) -> None:
    """As the reference's decode in float64: as many samples, and the same but for rounding."""
    expected = exact(name).decode_from_codes(semantic, acoustic)
    assert audio.shape == expected.shape
    if audio.numel():
        assert float((audio.double() - expected).abs().max()) <= TOLERANCE["stream, decode", F32]


class Session:
    """A decoder and, for every slot, its clips' codes and samples so far."""

    def __init__(self, name: str, batch: int, max_frames: int | None) -> None:
        self.name, self.batch = name, batch
        self.decoder = dx.StreamingDecoder(model(name), batch, max_frames)
        self.given: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(batch)]
        self.heard: list[list[Tensor]] = [[] for _ in range(batch)]
        self.clips: list[tuple[Tensor, Tensor, Tensor]] = []
        self.steps = 0

    def collect(self, audio: Tensor, mask: Sequence[bool]) -> None:
        counts = self.decoder.sample_counts
        assert audio.shape == (self.batch, 1, max(counts))
        for b in range(self.batch):
            assert mask[b] or counts[b] == 0
            assert not audio[b, :, counts[b] :].any()
            self.heard[b].append(audio[b : b + 1, :, : counts[b]].clone())

    def step(self, frames: int, mask: Sequence[bool]) -> None:
        self.steps += 1
        semantic, acoustic = codes(self.name, frames, self.steps, self.batch)
        for b in range(self.batch):
            if mask[b]:
                self.given[b].append((semantic[b : b + 1], acoustic[b : b + 1]))
            else:  # never looked at
                semantic[b] = -1
        self.collect(self.decoder.step(semantic, acoustic, None if all(mask) else mask), mask)

    def flush(self, mask: Sequence[bool]) -> None:
        self.collect(self.decoder.flush(None if all(mask) else torch.tensor(mask)), mask)
        for b in range(self.batch):
            if mask[b] and self.given[b]:
                semantic, acoustic = (torch.cat(parts, -1) for parts in zip(*self.given[b], strict=True))
                self.clips.append((semantic, acoustic, torch.cat(self.heard[b], -1)))
        self.forget(mask)

    def reset(self, mask: Sequence[bool]) -> None:
        self.decoder.reset(None if all(mask) else mask)
        self.forget(mask)

    def forget(self, mask: Sequence[bool]) -> None:
        for b in range(self.batch):
            if mask[b]:
                self.given[b], self.heard[b] = [], []

    def move(self, slot: int, onto: int) -> None:
        """Let a slot go on in another one, of another decoder of the same model."""
        flags = [[b == i for b in range(self.batch)] for i in (slot, onto)]
        state = self.decoder.state_dict(flags[0])
        self.decoder.load_state_dict(state, flags[1])
        self.given[onto], self.heard[onto] = list(self.given[slot]), list(self.heard[slot])


def run_session(name: str, data: Any, most_frames: int, most_slots: int, operations: int) -> Session:
    batch = data.draw(st.integers(1, most_slots), "slots")
    session = Session(name, batch, data.draw(st.sampled_from([None, 1, 3]), "max_frames"))
    masks = st.lists(st.booleans(), min_size=batch, max_size=batch) | st.just([True] * batch)
    for _ in range(data.draw(st.integers(1, operations), "operations")):
        what = data.draw(st.sampled_from(["step"] * 6 + ["flush", "flush twice", "reset", "move"]))
        mask = data.draw(masks, "mask")
        if what == "step":
            session.step(data.draw(st.sampled_from([0, 1, 1, 1, 2, most_frames]), "frames"), mask)
        elif what == "reset":
            session.reset(mask)
        elif what == "move":
            session.move(*data.draw(st.tuples(*[st.integers(0, batch - 1)] * 2), "slots"))
        else:
            for _ in range(1 if what == "flush" else 2):
                session.flush(mask)
                if what == "flush twice":
                    session.flush(mask)
                    assert all(count == 0 for count in session.decoder.sample_counts)
                    break
    session.flush([True] * batch)
    return session


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@drawn
@given(st.sampled_from(KINDS), st.data())
def test_any_cut_of_any_slots(name: str, data: Any) -> None:
    session = run_session(name, data, most_frames=9, most_slots=4, operations=12)
    for semantic, acoustic, audio in session.clips:
        assert torch.equal(audio, alone(name, semantic, acoustic))
        check_whole(name, audio, semantic, acoustic)


# What every session at real width holds, in an order that is drawn.
_OPERATIONS = ["one frame"] * 6 + ["no frames", "3 frames", "flush one", "flush one twice", "reset one", "move"]


@pytest.mark.parametrize("name", [*PRESETS, BUNDLED])
def test_any_cut_at_real_widths(name: str) -> None:
    """One frame at a time, empty steps, slots that flush, twice, reset and move while their neighbour goes on."""

    @settings(max_examples=3, deadline=None, derandomize=True)
    @given(st.permutations(_OPERATIONS), st.sampled_from([None, 1, 2]), st.data())
    def draw(operations: list[str], max_frames: int | None, data: Any) -> None:
        session = Session(name, 2, max_frames)
        session.step(1, [True, True])
        for operation in operations:
            one = data.draw(st.sampled_from([[True, False], [False, True]]), operation)
            if operation.endswith(("frame", "frames")):
                count = {"one frame": 1, "no frames": 0, "3 frames": 3}[operation]
                session.step(count, data.draw(st.sampled_from([[True, True], [True, True], one])))
            elif operation == "reset one":
                session.reset(one)
            elif operation == "move":
                session.move(one.index(True), one.index(False))
            else:
                session.flush(one)
                if operation == "flush one twice":
                    session.flush(one)
                    assert session.decoder.sample_counts == [0, 0]
        session.flush([True, True])
        assert session.clips
        for semantic, acoustic, audio in session.clips:
            assert torch.equal(audio, alone(name, semantic, acoustic))
            whole = model(name).decode_from_codes(semantic, acoustic)
            assert audio.shape == whole.shape
            assert float((audio - whole).abs().max()) <= TOLERANCE["stream, decode", F32]

    draw()


@pytest.mark.parametrize("name", PRESETS)
def test_whole_decode_at_real_widths(name: str) -> None:
    """Past the first frames: how far the output runs behind, and the whole decode's samples."""
    frames = LOOKAHEAD[name] + 6
    semantic, acoustic = codes(name, frames)
    decoder = dx.StreamingDecoder(model(name))
    parts, hop, at = [], model(name).dac.hop_length, 0
    for count in (1, 0, 1, 2, frames - 5, 1):
        parts.append(decoder.step(semantic[..., at : at + count], acoustic[..., at : at + count]))
        at += count
    assert decoder.lookahead_frames == LOOKAHEAD[name]
    assert decoder.latency_ms == pytest.approx(LOOKAHEAD[name] * hop / 24)
    assert parts[0].shape[2] == (0 if LOOKAHEAD[name] else hop)
    out = sum(part.shape[2] for part in parts)
    assert 6 * hop <= out < (7 if LOOKAHEAD[name] else 6) * hop + 1, (
        "of a frame after so many more, and not many before"
    )
    parts.append(decoder.flush())
    audio, whole = torch.cat(parts, -1), model(name).decode_from_codes(semantic, acoustic)
    assert audio.shape == whole.shape
    assert float((audio - whole).abs().max()) <= TOLERANCE["stream, decode", F32]


def test_error_at_real_widths() -> None:
    """By the rule of twice plain PyTorch's, against float64."""
    name, frames = "12hz_causal", 53
    semantic, acoustic = codes(name, frames)
    seeded = testing.seeded_model(settings_of(name))
    with torch.no_grad():
        baseline = seeded.decode_from_codes(semantic, acoustic)
        expected = seeded.double().decode_from_codes(semantic, acoustic)
    testing.assert_close_to_f64(alone(name, semantic, acoustic, max_frames=10), expected, baseline)


# Slots


@pytest.mark.parametrize("name", ["causal decoder", "look-ahead", "tiny"])
def test_an_idle_slot_is_not_touched(name: str) -> None:
    """Not its state, not its codes; NaN in one slot stays there."""
    decoder = dx.StreamingDecoder(model(name), 3)
    semantic, acoustic = codes(name, 30, batch=3)
    decoder.step(semantic[..., :5], acoustic[..., :5])
    before = decoder.state_dict([False, True, False])
    poison = decoder.state_dict([True, False, False])
    decoder.load_state_dict({**poison, "state": poison["state"].fill_(torch.nan)}, [True, False, False])
    for at in range(5, 30):
        part = semantic[..., at : at + 1].clone()
        part[1] = 1 << 40
        audio = decoder.step(part, acoustic[..., at : at + 1], mask=[True, False, True])
    assert audio[0].isnan().any() and not audio[1:].isnan().any()
    assert decoder.sample_counts[1] == 0 and decoder.frame_counts == [30, 5, 30]
    after = decoder.state_dict(torch.tensor([False, True, False]))
    assert torch.equal(before["state"], after["state"])
    decoder.reset([True, False, False])
    assert not decoder.step(semantic[..., :1], acoustic[..., :1]).isnan().any()


def test_a_stream_moves_between_decoders() -> None:
    """Through a file, into another decoder of another batch."""
    name = "look-ahead"
    semantic, acoustic = codes(name, 20)
    first, second = dx.StreamingDecoder(model(name)), dx.StreamingDecoder(model(name), 3, max_frames=2)
    parts = [first.step(semantic[..., :7], acoustic[..., :7])]
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    second.step(semantic.expand(3, -1, -1)[..., :4], acoustic.expand(3, -1, -1)[..., :4])
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue())), [False, False, True])
    rest = semantic.expand(3, -1, -1)[..., 7:], acoustic.expand(3, -1, -1)[..., 7:]
    for audio in (second.step(*rest, mask=[False, False, True]), second.flush([False, False, True])):
        parts.append(audio[2:])
    assert torch.equal(torch.cat(parts, -1), alone(name, semantic, acoustic))


def test_codebooks_may_change_from_step_to_step() -> None:
    for name in ("causal decoder", "centred blocks"):
        semantic, acoustic = codes(name, 12)
        decoder, parts = dx.StreamingDecoder(model(name)), []
        for at, stages in enumerate([3, 0, 1, 2, 3, 0, 0, 1, 3, 3, 2, 3]):
            some = None if stages == 0 else acoustic[:, :stages, at : at + 1]
            parts.append(decoder.step(semantic[..., at : at + 1], some))
        parts.append(decoder.flush())
        e = exact(name)
        latent = e.convnext_decoder(e.semantic_vq.from_codes(semantic)[0])
        for at, stages in enumerate([3, 0, 1, 2, 3, 0, 0, 1, 3, 3, 2, 3]):
            if stages:
                latent[..., at : at + 1] += e.dac.quantizer.from_codes(acoustic[:, :stages, at : at + 1])[0]
        expected = e.dac.decoder(latent)
        assert float((torch.cat(parts, -1) - expected).abs().max()) <= TOLERANCE["stream, decode", F32]


def test_out() -> None:
    name = "causal decoder"
    semantic, acoustic = codes(name, 3, batch=2)
    decoder, other = (dx.StreamingDecoder(model(name), 2) for _ in range(2))
    out = torch.full((2, 1, 3 * 30), torch.nan)
    audio = decoder.step(semantic, acoustic, out=out)
    assert audio.data_ptr() == out.data_ptr() and torch.equal(audio, other.step(semantic, acoustic))
    with pytest.raises(dx.DualCodecError, match=r"out must be \[2, 1, 90\] torch.float32, got \[2, 1, 89\]"):
        decoder.step(semantic, acoustic, out=out[..., 1:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    for name in ("causal decoder", "tiny"):
        semantic, acoustic = codes(name, 25)
        decoder = dx.StreamingDecoder(model(name, dtype))
        parts = [decoder.step(semantic[..., at : at + 5], acoustic[..., at : at + 5]) for at in range(0, 25, 5)]
        audio = torch.cat([*parts, decoder.flush()], -1)
        whole = model(name, dtype).decode_from_codes(semantic, acoustic)
        assert audio.dtype == dtype and audio.shape == whole.shape
        assert float((audio.double() - whole.double()).abs().max()) <= TOLERANCE["stream, decode", dtype]


def test_inference_mode_and_threads() -> None:
    name = "look-ahead"
    semantic, acoustic = codes(name, 12)
    wanted, before = alone(name, semantic, acoustic), torch.get_num_threads()
    decoder, parts = dx.StreamingDecoder(model(name)), []
    try:
        for at in range(12):
            torch.set_num_threads(1 + at % 2)
            with torch.inference_mode(at % 3 == 0):
                parts.append(decoder.step(semantic[..., at : at + 1], acoustic[..., at : at + 1]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.cat([*parts, decoder.flush()], -1), wanted)


def test_a_steady_step_allocates_nothing() -> None:
    """No memory of tensors that torch counts, with `out`; without it the result alone."""
    name = "12hz_causal"
    semantic, acoustic = codes(name, 30)
    decoder = dx.StreamingDecoder(model(name))
    out = torch.empty(1, 1, decoder._hop)

    def step(f: int, **how: Any) -> None:
        decoder.step(semantic[..., f : f + 1], acoustic[..., f : f + 1], **how)

    def allocated(call: Any) -> list[int]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            call()
        return [event.cpu_memory_usage for event in profile.events() if event.cpu_memory_usage > 0]

    for f in range(20):
        step(f, out=out)
    assert allocated(lambda: step(20, out=out)) == []
    assert set(allocated(lambda: step(21))) == {4 * decoder._hop}


# Refusals


def test_refusals() -> None:
    name = "causal decoder"
    decoder = dx.StreamingDecoder(model(name), 2, max_frames=2)
    semantic, acoustic = codes(name, 4, batch=2)
    decoder.step(semantic, acoustic)
    state = decoder.state_dict()
    wrong = acoustic.clone()
    wrong[1, 2, 3] = 33
    for call, text in (
        (lambda: decoder.step(semantic[:1]), r"semantic_codes must be \[2, 1, F\], got \[1, 1, 4\]"),
        (lambda: decoder.step(semantic, acoustic[..., :2]), "acoustic_codes must have the batch and frames"),
        (lambda: decoder.step(semantic.float()), "integers"),
        (lambda: decoder.step(semantic, wrong), r"must be in \[0, 33\), got 33 at slot 1, stage 2, frame 3"),
        (lambda: decoder.step(semantic, wrong, [False, True]), "got 33 at slot 1, stage 2, frame 3"),
        (lambda: decoder.step(semantic[..., 2:], wrong[..., 2:]), "got 33 at batch 1, stage 2, frame 1"),
        (lambda: decoder.step(-semantic - 1, acoustic), "semantic_codes must be in"),
    ):
        with pytest.raises(ValueError, match=text) as raised:
            call()
        assert "\n" not in str(raised.value)
    assert torch.equal(decoder.state_dict()["state"], state["state"]), "nothing has changed"
    for call, text in (
        (lambda: decoder.step(semantic, acoustic, [True]), r"mask must be \[2\] bool"),
        (lambda: decoder.step(semantic, acoustic, torch.ones(2)), r"mask must be \[2\] bool"),
        (lambda: decoder.step(semantic, acoustic, torch.tensor(True)), r"mask must be \[2\] bool"),
        (lambda: decoder.step(semantic, acoustic, 1), r"mask must be \[2\] bool, got 1"),  # type: ignore[arg-type]
        (lambda: decoder.step(semantic, acoustic, out=5), r"out must be \[2, 1, \d+\] torch.float32, got int"),  # type: ignore[arg-type]
        (lambda: dx.StreamingDecoder(model(name), 0), "batch_size must be a whole number from 1, got 0"),
        (lambda: dx.StreamingDecoder(model(name), lookahead=-1), "lookahead must be a whole number from 0"),
        (lambda: dx.StreamingDecoder(testing.seeded_model()), "model must be a dualcodec_ext.DualCodec"),  # type: ignore[arg-type]
        (lambda: decoder.load_state_dict(state, [True, False]), r"state must be \[1, "),
        (lambda: decoder.load_state_dict(None), "state must be what state_dict gave, got NoneType"),  # type: ignore[arg-type]
        (lambda: decoder.load_state_dict({**state, "frames": None}), r"frames must be \[2\] torch.int64, got NoneType"),
        (
            lambda: decoder.load_state_dict({**state, "frames": state["frames"][:1]}),
            r"frames must be \[2\] torch.int64, got",
        ),
        (lambda: decoder.load_state_dict({**state, "version": 0}), "version must be 1, got 0"),
        (lambda: dx.StreamingDecoder(model("tiny"), 2).load_state_dict(state), "lookahead_frames must be 16, got 0"),
    ):
        with pytest.raises(dx.DualCodecError, match=text) as raised:
            call()
        assert "\n" not in str(raised.value)


def test_models_that_cannot_stream() -> None:
    training = dx.DualCodec(**testing.TINY)
    with pytest.raises(dx.DualCodecError, match="must be in eval mode"):
        dx.StreamingDecoder(training.train())
    with dx.backend("reference"), pytest.raises(dx.DualCodecError, match="the engine must be able to run here"):
        dx.StreamingDecoder(model("tiny"))


def test_other_forms_of_the_model() -> None:
    """A fast model, and one whose parameters have gone; weights are those of when the decoder was made."""
    settings_ = {
        **settings_of("causal decoder"),
        "encoder_rates": (4, 5, 6),
        "decoder_rates": (6, 5, 4),
        "decoder_dim": 256,
    }
    seeded = testing.seeded_model(settings_)
    semantic, acoustic = codes("causal decoder", 12)
    results = []
    for made in (dx.accelerate(seeded), dx.accelerate(seeded, fast=True)):
        decoder = dx.StreamingDecoder(made)
        grouped = {s.winograd for s in (layer.step for layer in decoder._layers) if isinstance(s, ResidualUnitStep)}
        assert grouped == {0, 22 if made.fast else 13}
        parts = [decoder.step(semantic[..., at : at + 1], acoustic[..., at : at + 1]) for at in range(12)]
        whole = dx.StreamingDecoder(made).step(semantic, acoustic)
        assert torch.equal(torch.cat(parts, -1), whole)
        pair = dx.StreamingDecoder(made, 2, max_frames=5)
        assert torch.equal(pair.step(semantic.expand(2, -1, -1), acoustic.expand(2, -1, -1))[1:], whole)
        assert float((whole - made.decode_from_codes(semantic, acoustic)).abs().max()) < 1e-4
        results.append(whole)
    assert not torch.equal(*results)
    gone = dx.accelerate(testing.seeded_model(settings_), release=True)
    again = dx.StreamingDecoder(gone)
    parts = [again.step(semantic[..., at : at + 1], acoustic[..., at : at + 1]) for at in range(12)]
    assert float((torch.cat(parts, -1) - results[0]).abs().max()) <= TOLERANCE["stream, decode", F32]


def test_a_released_centred_model_has_no_upsampling_for_frames() -> None:
    wide = {**settings_of("causal decoder"), "causal_decoder": False, "decoder_dim": 128}
    gone = dx.accelerate(testing.seeded_model(wide), release=True)
    with pytest.raises(dx.DualCodecError, match="model must hold its parameters"):
        dx.StreamingDecoder(gone)
