"""Streaming encode: the codes of whole clips, whatever the cut of audio and features and the neighbours."""

from __future__ import annotations

import functools
import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import settings_of

import dualcodec_ext as dx
from dualcodec_ext import testing
from dualcodec_ext.semantic import LogMelFeatures

KINDS: dict[str, dict[str, Any]] = {
    "causal everywhere": {},
    "un-decoded": {"decode_semantic_for_codec": False, "convnext_dim": 64},
    "no blocks": {"convnext_layers": 0},
    "one codebook": {"n_codebooks": 1, "codebook_dim": 8},
}
BUNDLED = "preset tiny"  # with its trained weights and its own front end
LOG_MEL = {"encoder_rates": (4, 5, 6, 4), "decoder_rates": (4, 6, 5, 4), "semantic_dim": 160}


@functools.cache
def model(name: str) -> dx.DualCodec:
    if name == BUNDLED:
        return dx.DualCodec.from_pretrained("tiny").eval()
    changes = LOG_MEL if name == "log-mel" else KINDS.get(name)
    base = {**testing.TINY, "causal_encoder": True, "causal_decoder": True}
    return dx.accelerate(testing.seeded_model(settings_of(name) if changes is None else {**base, **changes}))


def check(name: str, batch: int, frames: int, data: Any, **how: Any) -> None:
    """Slots that begin one after the other, get pieces of their own sizes, one of which is reset, and end alone."""
    made = model(name)
    front_end = how.get("front_end", made.front_end)
    hop, dim = made.dac.hop_length, made.settings["semantic_dim"]
    encoder = dx.StreamingEncoder(made, batch, data.draw(st.sampled_from([None, 1, 3]), "max_frames"), **how)
    samples = [max(0, frames * hop - data.draw(st.integers(0, hop + 3), "short")) for _ in range(batch)]
    audio = [testing.make_speech(n, 1, seed=b) for b, n in enumerate(samples)]
    counts = [max(0, -(-n // hop) - data.draw(st.integers(0, 2), "features that are missing")) for n in samples]
    features = [testing.make_features(n, 1, dim, seed=b) for b, n in enumerate(counts)]
    if front_end is not None:
        features = [front_end(x) for x in audio]
    heard, seen = [0] * batch, [0] * batch
    found: list[list[Any]] = [[] for _ in range(batch)]

    def collect(codes: Any) -> None:
        for b, count in enumerate(encoder.frame_counts):
            assert not codes[0][b, :, count:].any()
            found[b].append([None if c is None else c[b : b + 1, :, :count] for c in codes])

    size = st.sampled_from([0, 1, 7, hop - 1, hop, 2 * hop + 1])

    def left(b: int) -> tuple[int, int]:
        return samples[b] - heard[b], 0 if front_end is not None else counts[b] - seen[b]

    steps_to_reset = data.draw(st.integers(0, 3), "steps before a slot is reset")
    while unfinished := [b for b in range(batch) if any(left(b))]:
        steps_to_reset -= 1
        if steps_to_reset == -1:  # its clip comes again
            again = data.draw(st.integers(0, batch - 1), "slot that is reset")
            encoder.reset([b == again for b in range(batch)])
            heard[again], seen[again], found[again] = 0, 0, []
        leader = data.draw(st.sampled_from(unfinished), "slot")
        take, some = left(leader)
        pieces = data.draw(st.tuples(size, st.integers(0, 3)), "samples and frames")
        if any(map(min, (take, some), pieces)):
            take, some = map(min, (take, some), pieces)
        joins = data.draw(st.lists(st.booleans(), min_size=batch, max_size=batch), "slots that join")
        mask = [b == leader or (joins[b] and left(b)[0] >= take and left(b)[1] >= some) for b in range(batch)]
        x, y = torch.full((batch, 1, take), torch.nan), torch.full((batch, dim, some), torch.nan)
        for b in range(batch):
            if mask[b]:
                x[b] = audio[b][0, :, heard[b] : heard[b] + take]
                y[b] = features[b][0, :, seen[b] : seen[b] + some]
                heard[b], seen[b] = heard[b] + take, seen[b] + some
        collect(encoder.step(x, None if front_end is not None else y, mask))
    collect(encoder.flush())
    collect(encoder.flush())
    for b in range(batch):
        wanted = made.encode(audio[b], how.get("num_quantizers"), semantic_repr=features[b])
        assert torch.equal(torch.cat([c[0] for c in found[b]], -1), wanted[0])
        if wanted[1] is not None:
            assert torch.equal(torch.cat([c[1] for c in found[b]], -1), wanted[1])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.sampled_from(list(KINDS)), st.integers(1, 3), st.integers(0, 12), st.sampled_from([None, 1, 2]), st.data())
def test_any_cut(name: str, batch: int, frames: int, quantizers: int | None, data: Any) -> None:
    check(name, batch, frames, data, num_quantizers=quantizers)


@pytest.mark.parametrize("name", ["12hz_stream", BUNDLED])
def test_any_cut_at_real_widths(name: str) -> None:
    @settings(max_examples=4, deadline=None, derandomize=True)
    @given(st.data())
    def draw(data: Any) -> None:
        check(name, 2, 4, data)

    draw()


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.data())
def test_audio_alone_with_a_front_end(data: Any) -> None:
    check("log-mel", 2, 7, data, front_end=LogMelFeatures(1))


def test_a_frame_comes_with_its_last_sample() -> None:
    made = model("causal everywhere")
    hop = made.dac.hop_length
    encoder = dx.StreamingEncoder(made)
    audio, features = testing.make_speech(2 * hop, 1), testing.make_features(2, 1, 20)
    assert encoder.step(audio[..., : hop - 1], features)[0].shape[2] == 0
    assert encoder.step(audio[..., hop - 1 : hop])[0].shape[2] == 1
    assert encoder.step(audio[..., hop:])[0].shape[2] == 1
    encoder.reset()
    assert torch.equal(encoder.step(audio, features)[0], made.encode(audio, semantic_repr=features)[0])


@pytest.mark.parametrize("name", ["causal everywhere", "log-mel"])
def test_a_stream_moves_to_another_encoder(name: str) -> None:
    made = model(name)
    front_end = LogMelFeatures(1) if name == "log-mel" else None
    hop, dim = made.dac.hop_length, made.settings["semantic_dim"]
    audio = testing.make_speech(9 * hop, 1)
    features = testing.make_features(9, 1, dim) if front_end is None else front_end(audio)
    first = dx.StreamingEncoder(made, front_end=front_end)
    second = dx.StreamingEncoder(made, 3, max_frames=2, front_end=front_end)
    cut, seen = 4 * hop + hop // 2 + 1, 6  # part of a frame waits, and features ahead of their audio
    parts = [first.step(audio[..., :cut], None if front_end is not None else features[..., :seen])]
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    first.reset()
    mask = [False, False, True]
    second.step(testing.make_speech(hop + 3, 3), None if front_end is not None else features[..., :1].expand(3, -1, -1))
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue())), mask)
    rest = None if front_end is not None else features[..., seen:].expand(3, -1, -1)
    for found in (second.step(audio[..., cut:].expand(3, -1, -1), rest, mask), second.flush(mask)):
        parts.append(tuple(None if c is None else c[2:] for c in found))  # type: ignore[arg-type]
    wanted = made.encode(audio, semantic_repr=features)
    for i in (0, 1):
        assert torch.equal(torch.cat([part[i] for part in parts], -1), wanted[i])  # type: ignore[misc]


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    made = model("causal everywhere")
    encoder = dx.StreamingEncoder(made, 2)
    encoder.step(torch.ones(2, 1, 45), torch.ones(2, 20, 2))
    state = encoder.state_dict()
    one = encoder.state_dict([True, False])
    for other, text in (
        (5, "state must be what state_dict gave, got int"),
        ({**state, "version": 0}, "version must be 1, got 0"),
        ({**state, "front_end": True}, "front_end must be False, got True"),
        (dx.StreamingEncoder(made, 2, num_quantizers=1).state_dict(), r"acoustic_codebooks must be \d+, got 0"),
        (one, r"state must be \[2, \d+\] torch.float32, got \[1, \d+\]"),
        ({**state, "before": None}, r"before must be \[2, \d+\] torch.float32, got NoneType"),
        ({**state, "audio": state["audio"][:1]}, "audio must hold a tensor per slot, 2, got 1"),
        ({**state, "features": [torch.ones(3, 1)] * 2}, r"features must be \[20, n\] torch.float32, got \[3, 1\]"),
    ):
        with pytest.raises(dx.DualCodecError, match=text):
            encoder.load_state_dict(other)  # type: ignore[arg-type]
    after = encoder.state_dict()
    for what in ("state", "before"):
        assert torch.equal(after[what], state[what])
    for what in ("audio", "features"):
        assert all(map(torch.equal, after[what], state[what]))
    assert [x.shape[-1] for x in state["audio"]] == [45 % made.dac.hop_length] * 2, "copies, of what still waits"


def test_refusals() -> None:
    made = model("causal everywhere")
    encoder = dx.StreamingEncoder(made, 2)
    audio, features = torch.zeros(2, 1, 30), torch.zeros(2, 20, 1)
    for call, text in (
        (lambda: encoder.step(audio[:1]), r"audio must be \[2, 1, S\] float, got \[1, 1, 30\]"),
        (lambda: encoder.step([0.0]), r"audio must be \[2, 1, S\] float, got list"),  # type: ignore[arg-type]
        (lambda: encoder.step(audio, features[:, 1:]), r"semantic_repr must be \[2, 20, F\] float"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
    encoder.step(audio, features[..., :0], [False, True])
    encoder.step(torch.zeros(2, 1, 90), None, [False, True])
    with pytest.raises(dx.DualCodecError, match="slot 1 must have features for its 4 last frames, or up to 2 fewer"):
        encoder.flush()
    centred = dx.accelerate(testing.seeded_model())
    for call, text in (
        (lambda: dx.StreamingEncoder(centred), "must have causal_encoder=True and is_causal=True"),
        (lambda: dx.StreamingEncoder(made, front_end=LogMelFeatures(1)), "front_end must give 20 channels every 30"),
        (lambda: dx.StreamingEncoder(made, front_end="mel"), "front_end must be a LogMelFeatures, got str"),  # type: ignore[arg-type]
        (lambda: dx.StreamingEncoder(made, num_quantizers=0), "num_quantizers must be a whole number from 1"),
    ):
        with pytest.raises(dx.DualCodecError, match=text):
            call()
