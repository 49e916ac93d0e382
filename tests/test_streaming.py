"""Streams: the pieces are the whole clip's samples, whatever the cut, the neighbours and the batch."""

from __future__ import annotations

import functools
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

# No deadline: a shared machine may take any time over one example, and a timing decides nothing.
drawn = settings(max_examples=50, deadline=None, derandomize=True)
KINDS = [name for name in ODD if name != "distill"]
LOOKAHEAD = {"12hz_v1": 27, "25hz_v1": 10, "12hz_causal": 0, "12hz_lookahead": 2, "12hz_stream": 0}


@functools.cache
def model(name: str, dtype: torch.dtype = torch.float32) -> dx.DualCodec:
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


@drawn
@given(st.sampled_from(KINDS), st.data())
def test_any_cut_of_any_slots(name: str, data: Any) -> None:
    session = run_session(name, data, most_frames=9, most_slots=4, operations=12)
    for semantic, acoustic, audio in session.clips:
        assert torch.equal(audio, alone(name, semantic, acoustic))
        check_whole(name, audio, semantic, acoustic)


@pytest.mark.parametrize("name", PRESETS)
def test_any_cut_at_real_widths(name: str) -> None:
    @settings(max_examples=2, deadline=None, derandomize=True)
    @given(st.data())
    def draw(data: Any) -> None:
        session = run_session(name, data, most_frames=3, most_slots=2, operations=5)
        for semantic, acoustic, audio in session.clips:
            assert torch.equal(audio, alone(name, semantic, acoustic))
            assert audio.shape[2] == model(name).output_samples(semantic.shape[2])

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
