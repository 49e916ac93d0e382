"""Long clips: in any chunks, in spans, in padded batches, the results of the whole."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import ODD, PRESETS, settings_of
from torch import Tensor

import dualcodec_ext as dx
from dualcodec_ext import testing
from dualcodec_ext.reference import spans

# No deadline: a shared machine may take any time over one example, and a timing decides nothing.
drawn = settings(max_examples=30, deadline=None, derandomize=True)
KINDS = [name for name in ODD if name not in ("distill", "one codebook")]
FORMS = [(name, fast) for name in KINDS for fast in (False, True)]


@functools.cache
def model(name: str, fast: bool = False) -> dx.DualCodec:
    """A small model, or one with a preset's layers and few channels."""
    narrow = {"encoder_dim": 4, "decoder_dim": 64, "latent_dim": 32, "convnext_dim": 32, "semantic_dim": 20}
    narrow |= {"convnext_intermediate_dim": 32, "codebook_size": 64, "semantic_codebook_size": 128}
    settings = settings_of(name) | (narrow if name in PRESETS else {})
    return dx.accelerate(testing.seeded_model(settings), fast=fast)


def codes(made: dx.DualCodec, batch: int, frames: int, stages: int = 3) -> tuple[Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(batch * 1000 + frames)
    semantic = torch.randint(made.settings["semantic_codebook_size"], (batch, 1, frames), generator=g)
    if not stages:
        return semantic, None
    return semantic, torch.randint(made.settings["codebook_size"], (batch, stages, frames), generator=g)


def speech(made: dx.DualCodec, batch: int, frames: int, missing: int = 0, cut: int = 0) -> tuple[Tensor, Tensor]:
    samples = max(0, frames * made.dac.hop_length - cut)
    features = testing.make_features(max(0, frames - missing), batch, made.settings["semantic_dim"], seed=frames)
    return testing.make_speech(samples, batch, seed=frames), features


def equal(found: Any, wanted: Any) -> bool:
    return all(a is b is None or torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# Chunks


@drawn
@given(st.sampled_from(FORMS), st.integers(1, 90), st.integers(0, 3), st.integers(0, 3), st.integers(1, 100), st.data())
def test_decode_in_any_chunks(
    form: tuple[str, bool], frames: int, batch: int, stages: int, chunk: int, data: Any
) -> None:
    made = model(*form)
    pair = codes(made, batch, frames, stages)
    own = None
    if data.draw(st.booleans(), "with lengths"):
        own = torch.tensor(data.draw(st.lists(st.integers(0, frames), min_size=batch, max_size=batch)))
        own = own.to(torch.int64)
    wanted = made.decode_from_codes(*pair, own)
    assert torch.equal(made.decode_from_codes(*pair, own, chunk_frames=chunk), wanted)
    # What a GPU does: stretches with the frames around them that they need.
    if batch and chunk < frames:
        in_stretches = super(dx.DualCodec, made)._decode_long(*pair, own, chunk)
        assert torch.equal(in_stretches, wanted)
    if batch:
        pieces = list(made.decode_pieces(*pair, chunk))
        assert torch.equal(torch.cat(pieces, -1), made.decode_from_codes(*pair))


@drawn
@given(st.sampled_from(KINDS), st.integers(1, 60), st.integers(0, 3), st.integers(1, 4), st.integers(1, 70), st.data())
def test_encode_in_any_chunks(name: str, frames: int, batch: int, quantizers: int, chunk: int, data: Any) -> None:
    made = model(name)
    hop = made.dac.hop_length
    missing = data.draw(st.integers(0, min(2, frames - 1)), "frames of features that are missing")
    audio, features = speech(made, batch, frames, missing, data.draw(st.integers(0, hop - 1)))
    own: dict[str, Any] = {}
    if data.draw(st.booleans(), "with lengths"):
        drawn_lengths = data.draw(st.lists(st.integers(0, audio.shape[-1]), min_size=batch, max_size=batch))
        own["lengths"] = torch.tensor(drawn_lengths).to(torch.int64)
    whole = made.encode(audio, quantizers, semantic_repr=features, **own)
    assert equal(made.encode(audio, quantizers, semantic_repr=features, chunk_frames=chunk, **own), whole)
    if batch and chunk < frames - missing:
        lengths = own.get("lengths")
        frame_lengths = None if lengths is None else ((lengths + hop - 1) // hop).clamp(max=features.shape[-1])
        in_stretches = super(dx.DualCodec, made)._encode_long(
            audio, features, min(quantizers, 4), lengths, frame_lengths, chunk
        )
        assert equal(in_stretches, whole)


def cut(whole: Tensor, at: list[int]) -> list[Tensor]:
    return list(whole.tensor_split(sorted(at), -1))


def joined(pieces: Any) -> tuple[Tensor, Tensor | None]:
    kinds = list(zip(*pieces, strict=True))
    assert all(c is None or c.shape[-1] == s.shape[-1] > 0 for s, c in zip(*kinds, strict=True))
    return torch.cat(kinds[0], -1), None if kinds[1][0] is None else torch.cat(kinds[1], -1)


@drawn
@given(st.sampled_from(KINDS), st.integers(1, 60), st.integers(1, 2), st.integers(1, 4), st.integers(1, 70), st.data())
def test_encode_of_any_pieces(name: str, frames: int, batch: int, quantizers: int, chunk: int, data: Any) -> None:
    """Audio and features in any pieces, one ahead of the other or not at all."""
    made = model(name)
    missing = data.draw(st.integers(0, min(2, frames - 1)), "frames of features that are missing")
    audio, features = speech(made, batch, frames, missing, data.draw(st.integers(0, made.dac.hop_length - 1)))
    parts = data.draw(st.integers(1, 6))
    places = [
        data.draw(st.lists(st.integers(0, x.shape[-1]), min_size=parts - 1, max_size=parts - 1))
        for x in (audio, features)
    ]
    pieces = list(zip(cut(audio, places[0]), cut(features, places[1]), strict=True))
    wanted = made.encode(audio, quantizers, semantic_repr=features)
    assert equal(joined(made.encode_pieces(pieces, quantizers, chunk)), wanted)
    # What a GPU does: stretches with the frames around them that they need.
    assert equal(joined(super(dx.DualCodec, made)._encode_pieces(pieces, min(quantizers, 4), chunk)), wanted)


def test_pieces_of_codes_leave_early() -> None:
    made = model("tiny")
    audio, features = speech(made, 1, 60)
    given = 0

    def pieces() -> Any:
        nonlocal given
        for pair in zip(audio.split(10 * made.dac.hop_length, -1), features.split(10, -1), strict=True):
            given += 10
            yield pair

    had = 0
    for semantic, _ in made.encode_pieces(pieces(), chunk_frames=10):
        had += semantic.shape[-1]
        assert given - had < 20
    assert had == 60
    assert list(made.encode_pieces([])) == []


def test_wrong_pieces_are_one_line() -> None:
    made = model("tiny")
    audio, features = speech(made, 2, 10)
    one, none = made.encode_pieces, audio[..., :0]
    for call, text in (
        (lambda: one([(audio, features[:, 1:])]), r"semantic_repr must be \[B, \d+, F\] float, got \[2, \d+, 10\]"),
        (lambda: one(audio), r"every piece must be a pair \(audio \[B, 1, n\], features \[B, C, k\]\), got Tensor"),
        (lambda: one([(audio, features, None)]), "every piece must be a pair .* got 3 of them"),
        (lambda: one(None), r"encode_pieces: pieces must be pairs \(audio .*, one after the other, got NoneType"),
        (lambda: one([(audio[:1], features)]), r"encode_pieces: audio_data must be \[2, 1, S\] float, got \[1, 1"),
        (lambda: one([(audio, features), (none[:1], features[:1])]), "must be of the first one's 2 clips, got 1"),
        (lambda: one([(audio, features[..., :7])]), "= 10 frames or up to 2 fewer, got 7"),
        (lambda: one([(audio, features)], 0), "encode_pieces: num_quantizers must be at least 1, got 0"),
        (lambda: one([(audio, features)], chunk_frames=0), "encode_pieces: chunk_frames must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=text) as error:
            list(call())
        assert "\n" not in str(error.value)
    with pytest.raises(RuntimeError, match="encode_pieces: the model must be in eval mode"):
        testing.seeded_model(settings_of("tiny")).train().encode_pieces([(audio, features)])


def test_the_reference_in_chunks() -> None:
    for name, chunk in zip(KINDS, [3, 30, 7, 12, 8, 9, 20, 15, 4, 11], strict=True):
        made = testing.seeded_model(settings_of(name)).double()
        pair = codes(model(name), 2, 31)
        own = torch.tensor([31, 12])
        wanted = made.decode_from_codes(*pair, own)
        torch.testing.assert_close(made.decode_from_codes(*pair, own, chunk_frames=chunk), wanted, atol=1e-12, rtol=0)
        audio, features = (x.double() for x in speech(model(name), 2, 31, 1))
        own = torch.tensor([audio.shape[-1], 100])
        wanted = made.encode(audio, semantic_repr=features, lengths=own)
        assert equal(made.encode(audio, semantic_repr=features, lengths=own, chunk_frames=chunk), wanted)
        pieces = zip(audio.split(1000, -1), features.tensor_split(-(-audio.shape[-1] // 1000), -1), strict=True)
        alone = made.encode(audio, semantic_repr=features)
        assert equal(joined(made.encode_pieces(pieces, chunk_frames=chunk)), alone)


@pytest.mark.parametrize("value, text", [(0, "must be at least 1, got 0"), (1.5, "must be an integer, got 1.5")])
def test_a_wrong_chunk_is_one_line(value: Any, text: str) -> None:
    made = model("tiny")
    pair = codes(made, 1, 5)
    audio, features = speech(made, 1, 5)
    for name, call in (
        ("decode_from_codes", lambda: made.decode_from_codes(*pair, chunk_frames=value)),
        ("decode_pieces", lambda: made.decode_pieces(*pair, chunk_frames=value)),
        ("encode", lambda: made.encode(audio, semantic_repr=features, chunk_frames=value)),
    ):
        with pytest.raises(ValueError, match=f"DualCodec.{name}: chunk_frames {text}"):
            call()


def test_a_code_out_of_range_is_named_by_its_place_in_the_clip() -> None:
    made = model("tiny")
    semantic, acoustic = codes(made, 1, 50)
    assert acoustic is not None
    acoustic[0, 1, 40] = 33
    for call in (
        lambda: made.decode_from_codes(semantic, acoustic, chunk_frames=7),
        lambda: list(made.decode_pieces(semantic, acoustic, 7)),
    ):
        with pytest.raises(ValueError, match=r"got 33 at batch 0, stage 1, frame 40"):
            call()


def test_pieces_take_codes_of_any_integer_type_and_leave_early() -> None:
    made = model("tiny")
    semantic, acoustic = codes(made, 1, 200)
    assert acoustic is not None
    wanted = made.decode_from_codes(semantic, acoustic)
    pieces = list(made.decode_pieces(semantic.to(torch.uint16), acoustic.to(torch.uint16), 10))
    assert torch.equal(torch.cat(pieces, -1), wanted)
    assert 10 < len(pieces) <= 20 and all(piece.shape[-1] for piece in pieces)
    assert max(piece.shape[-1] for piece in pieces) <= wanted.shape[-1] // 2
    for made_so in (made, testing.seeded_model(settings_of("tiny"))):
        none = semantic[..., :0]
        assert list(made_so.decode_pieces(none, acoustic[..., :0], 10)) == list(made_so.decode_pieces(none, None)) == []


# Spans


@drawn
@given(st.sampled_from(FORMS), st.integers(1, 120), st.integers(0, 3), st.data())
def test_a_span_is_that_of_the_whole(form: tuple[str, bool], frames: int, stages: int, data: Any) -> None:
    made = model(*form)
    semantic, acoustic = codes(made, 1, frames, stages)
    wanted = made.decode_from_codes(semantic, acoustic)
    begin = data.draw(st.integers(0, wanted.shape[-1]))
    end = data.draw(st.integers(begin, min(wanted.shape[-1], begin + 300)))
    assert torch.equal(made.decode_span(semantic, acoustic, begin, end), wanted[..., begin:end])
    # Nothing past the frames that it says it needs is read.
    first, last = made.span_frames(begin, end, frames)
    spoilt = torch.full_like(semantic, 1 << 40)
    spoilt[..., first:last] = semantic[..., first:last]
    if begin < end:
        assert torch.equal(made.decode_span(spoilt, acoustic, begin, end), wanted[..., begin:end])


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_a_span_of_a_preset(name: str, fast: bool) -> None:
    made = model(name, fast)
    frames = 640
    semantic, acoustic = codes(made, 1, frames, 2)
    wanted = made.decode_from_codes(semantic, acoustic)
    hop = made.dac.hop_length
    begin, end = 450 * hop + 123, 451 * hop + 5
    assert torch.equal(made.decode_span(semantic, acoustic, begin, end), wanted[..., begin:end])
    first, last = made.span_frames(begin, end, frames)
    assert first > 0 and last < frames


def test_a_wrong_span_is_one_line() -> None:
    made = model("tiny")
    pair = codes(made, 1, 5)
    for begin, end in ((-1, 3), (4, 3), (0, 10_000)):
        text = rf"decode_span: begin and end must be in \[0, \d+\] and in order, got {begin} and {end}"
        with pytest.raises(ValueError, match=text):
            made.decode_span(*pair, begin, end)
    for wrong in (0.5, "0", True):
        with pytest.raises(ValueError, match="decode_span: begin and end must be integers, got"):
            made.decode_span(*pair, wrong, 20)


def test_reach_is_tight() -> None:
    """The samples that differ where one frame is changed are those that depend on it, the first and the last."""
    for name in KINDS:
        made = testing.seeded_model(settings_of(name)).double()
        codec = spans.codec_of(made)
        semantic, acoustic = codes(model(name), 1, 60)
        other = semantic.clone()
        other[..., 30] = (other[..., 30] + 1) % 100
        changed = (made.decode_from_codes(semantic, acoustic) != made.decode_from_codes(other, acoustic)).nonzero()
        first, last = int(changed[0, 2]), int(changed[-1, 2])
        layers = [*codec.semantic_decoder, *codec.decoder]
        depends = [
            s for s in range(made.output_samples(60)) if (lambda r: r[0] <= 30 < r[1])(spans.needed(layers, s, s + 1))
        ]
        assert (first, last) == (depends[0], depends[-1]), name


# Batches


@drawn
@given(st.sampled_from(FORMS), st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(0, 3), st.data())
def test_a_clip_in_a_padded_batch_decodes_as_alone(
    form: tuple[str, bool], frames: list[int], stages: int, data: Any
) -> None:
    made = model(*form)
    extra = data.draw(st.integers(0, 3))
    semantic, acoustic = codes(made, len(frames), max(frames) + extra, stages)
    for b, n in enumerate(frames):  # codes that no codebook has: nobody looks at them
        semantic[b, :, n:] = 1 << 40
        if acoustic is not None:
            acoustic[b, :, n:] = -1
    chunk = data.draw(st.none() | st.integers(1, 50))
    audio = made.decode_from_codes(semantic, acoustic, torch.tensor(frames), chunk)
    for b, n in enumerate(frames):
        own = made.decode_from_codes(
            semantic[b : b + 1, :, :n], None if acoustic is None else acoustic[b : b + 1, :, :n]
        )
        assert torch.equal(audio[b : b + 1, :, : own.shape[-1]], own)
        assert not audio[b, :, own.shape[-1] :].any()


@drawn
@given(st.sampled_from(KINDS), st.lists(st.integers(0, 900), min_size=1, max_size=5), st.integers(1, 4), st.data())
def test_a_clip_in_a_padded_batch_encodes_as_alone(name: str, samples: list[int], quantizers: int, data: Any) -> None:
    """Samples and features behind a clip's end may be anything, and features may end before the audio."""
    made = model(name)
    hop = made.dac.hop_length
    frames = [-(-n // hop) for n in samples]
    audio, features = speech(made, len(samples), max(frames))
    audio = audio[..., : max(samples)]
    own = [n - data.draw(st.integers(0, min(2, n)), "missing frames of features") for n in frames]
    features = features[..., : max(own)]
    if max(frames) - max(own) > 2:
        return
    for b, (s, n) in enumerate(zip(samples, own, strict=True)):
        audio[b, :, s:] = torch.nan
        features[b, :, n:] = torch.nan
    chunk = data.draw(st.none() | st.integers(1, 50))
    lengths = {"lengths": torch.tensor(samples), "feature_lengths": torch.tensor(own)}
    semantic, acoustic = made.encode(audio, quantizers, semantic_repr=features, chunk_frames=chunk, **lengths)
    for b, (s, n) in enumerate(zip(samples, own, strict=True)):
        alone = made.encode(audio[b : b + 1, :, :s], quantizers, semantic_repr=features[b : b + 1, :, :n])
        found = semantic[b : b + 1, :, :n], None if acoustic is None else acoustic[b : b + 1, :, :n]
        assert equal(found, alone)
        assert not semantic[b, :, n:].any() and (acoustic is None or not acoustic[b, :, n:].any())


def test_wrong_feature_lengths_are_one_line() -> None:
    made = model("tiny")
    audio, features = speech(made, 2, 10)
    own = torch.tensor([300, 60])
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"feature_lengths": torch.tensor([10, 2])}, "feature_lengths needs lengths, the samples of each item"),
        ({"lengths": own, "feature_lengths": torch.tensor([10, 3])}, r"= \[10, 2\] or up to 2 fewer, got \[10, 3\]"),
        ({"lengths": own, "feature_lengths": torch.tensor([7, 2])}, r"= \[10, 2\] or up to 2 fewer, got \[7, 2\]"),
        ({"lengths": own, "feature_lengths": torch.tensor([10])}, r"feature_lengths must be \[2\] int64"),
    ]
    for options, text in wrong:
        with pytest.raises(ValueError, match=f"DualCodec.encode: .*{text}"):
            made.encode(audio, semantic_repr=features, **options)
