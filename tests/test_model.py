"""DualCodec on the engine: the reference's codes and samples, for every preset and for odd settings."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import dualcodec_ext as dx
from dualcodec_ext import reference, testing
from dualcodec_ext.tiles import Sizes

ODD = {
    "tiny": {},
    "one codebook": {"n_codebooks": 1, "codebook_dim": 8},
    "33 entries": {"codebook_size": 33, "semantic_codebook_size": 33},
    "un-decoded": {"decode_semantic_for_codec": False, "convnext_dim": 64},
    "rate 7": {"encoder_rates": (7, 3), "decoder_rates": (3, 7)},
    "latent 40": {"latent_dim": 40},
    "centred blocks": {"is_causal": False},
    "causal decoder": {"causal_decoder": True},
    "look-ahead": {"look_ahead": True},
    "causal everywhere": {"causal_decoder": True, "causal_encoder": True},
    "no blocks": {"convnext_layers": 0},
    "distill": {"distill": True},
}
PRESETS = ["12hz_v1", "25hz_v1", "12hz_causal", "12hz_lookahead", "12hz_stream"]


def settings_of(name: str) -> dict[str, Any]:
    return dx.DualCodecConfig.preset(name).to_dict() if name in PRESETS else {**testing.TINY, **ODD[name]}


def inputs(model: reference.DualCodec, frames: int, batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    audio = testing.make_speech(frames * model.dac.hop_length - 5, batch, seed=seed)
    return audio, testing.make_features(frames, batch, model.settings["semantic_dim"], seed)


def tiny(**changes: Any) -> tuple[reference.DualCodec, dx.DualCodec]:
    model = testing.seeded_model({**testing.TINY, **changes})
    return model, dx.accelerate(model)


@pytest.fixture(scope="module", params=[*ODD, *PRESETS])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[str, reference.DualCodec, dx.DualCodec]]:
    model = testing.seeded_model(settings_of(request.param))
    yield request.param, model, dx.accelerate(model)


def test_parity(pair: tuple[str, reference.DualCodec, dx.DualCodec]) -> None:
    """Codes as float64's, but for margins that rounding can turn; the waveform by the rule of twice plain PyTorch."""
    name, model, fast = pair
    frames = 12 if name in PRESETS else 40
    audio, feat = inputs(model, frames)
    exact = copy.deepcopy(model).double()
    semantic, acoustic = fast.encode(audio, semantic_repr=feat)
    assert fast._engine_state is not None, "the engine must have run"
    latent = exact.convnext_encoder(feat.double())
    check_codes(semantic, latent, exact.semantic_vq)
    z = exact.dac.encoder(exact.dac.preprocess(audio.double(), None))[..., :frames]
    subtracted = exact.semantic_vq.from_codes(semantic)[0]
    if exact.decode_semantic_for_codec:
        subtracted = exact.convnext_decoder(subtracted)
    check_codes(acoustic, z - subtracted, exact.dac.quantizer)
    assert torch.equal(fast.semantic_quantize(feat), semantic[:, 0])

    longer = -(-100_000 // model.output_samples(frames))
    semantic, acoustic = (c.repeat(1, 1, longer) for c in (semantic, acoustic))
    with torch.no_grad():
        expected, baseline = (
            exact.decode_from_codes(semantic, acoustic),
            model.decode_from_codes(semantic, acoustic),
        )
    testing.assert_close_to_f64(fast.decode_from_codes(semantic, acoustic), expected, baseline)


def test_tiles_have_the_bits_of_whole_tensors(pair: tuple[str, reference.DualCodec, dx.DualCodec]) -> None:
    """At the widths of every preset; tests/test_tiles.py draws sizes at small ones."""
    _, model, fast = pair
    frames = 9
    audio, feat = inputs(model, frames)
    codes = fast.encode(audio, semantic_repr=feat)
    assert fast._engine_state is not None
    engine = fast._engine_state[1].engine
    audio = torch.nn.functional.pad(audio, (0, 5))
    with torch.no_grad():
        wanted, wav = engine.encode(audio, feat, None, None), engine.decode(*codes, None)
        for sizes in (None, Sizes(pass_bytes=1, fewest_rows=2, gather=0)):
            engine.set_tiles(sizes)
            found = engine.encode_clips(audio, feat, None, None, None)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
            assert torch.equal(engine.decode_clips(*codes, None), wav)
    engine.set_tiles(None)


def check_codes(codes: Tensor, z: Tensor, rvq: reference.ResidualVectorQuantize) -> None:
    """Codes [B, q, F] of a float64 latent; the bound allows an encoder's rounding, 64 times that of one addition."""
    tensors = rvq.op_tensors(torch.float64)
    expected, _, margins = reference.rvq_search_ref(z, **tensors, return_margin=True)
    bound = testing.rvq_margin_bound(z, **tensors, relative_error=2.0**-16)
    report = testing.compare_codes(codes, expected, margins, bound)
    assert report.equal >= 0.95 * report.total, str(report)


@pytest.mark.parametrize("quantizers", [1, 2, 3, 4, 9, None])
def test_prefixes(quantizers: int | None) -> None:
    model, fast = tiny()
    audio, feat = inputs(model, 9)
    semantic, acoustic = fast.encode(audio, quantizers, semantic_repr=feat)
    expected = model.encode(audio, quantizers, semantic_repr=feat)
    assert torch.equal(semantic, expected[0])
    if quantizers == 1:
        assert acoustic is None and expected[1] is None
    else:
        assert torch.equal(acoustic, expected[1])
    torch.testing.assert_close(
        fast.decode_from_codes(semantic, acoustic),
        model.decode_from_codes(semantic, acoustic),
        rtol=0,
        atol=2e-5,
    )


@pytest.mark.parametrize("name", ["tiny", "look-ahead", "causal everywhere", "rate 7", "12hz_v1"])
def test_lengths_and_batches_bit_for_bit(name: str) -> None:
    """A clip gives the same codes and samples alone, in a batch, and padded with anything."""
    model = testing.seeded_model(settings_of(name))
    fast = dx.accelerate(model)
    hop, frames = model.dac.hop_length, 8
    audio, feat = inputs(model, frames, batch=4)
    lengths = torch.tensor([audio.shape[-1], 3 * hop + 1, 0, hop])
    counts = -(-lengths // hop)
    padded = testing.poison_past_lengths(audio, lengths)
    semantic, acoustic = fast.encode(padded, semantic_repr=testing.poison_past_lengths(feat, counts), lengths=lengths)
    wav = fast.decode_from_codes(semantic, acoustic, lengths=counts)
    for i, (samples, n) in enumerate(zip(lengths.tolist(), counts.tolist(), strict=True)):
        s, a = fast.encode(audio[i : i + 1, :, :samples], semantic_repr=feat[i : i + 1, :, :n])
        assert torch.equal(semantic[i : i + 1, :, :n], s) and torch.equal(acoustic[i : i + 1, :, :n], a)
        assert not semantic[i, :, n:].any() and not acoustic[i, :, n:].any()
        alone = fast.decode_from_codes(s, a)
        assert torch.equal(wav[i : i + 1, :, : alone.shape[-1]], alone)
        assert not wav[i, :, alone.shape[-1] :].any()


def test_threads_do_not_change_bits() -> None:
    model, fast = tiny()
    audio, feat = inputs(model, 60, batch=2)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            codes = fast.encode(audio, semantic_repr=feat)
            results.append((*codes, fast.decode_from_codes(*codes)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    model = testing.seeded_model({**testing.TINY, "convnext_layers": 1})
    audio, feat = inputs(model, 60)
    exact = copy.deepcopy(model).double()
    semantic, acoustic = exact.encode(audio.double(), semantic_repr=feat.double())
    semantic, acoustic = (c.repeat(1, 1, 60) for c in (semantic, acoustic))
    expected = exact.decode_from_codes(semantic, acoustic)
    cast = copy.deepcopy(model).to(dtype)
    baseline = cast.decode_from_codes(semantic, acoustic)
    wav = dx.accelerate(cast).decode_from_codes(semantic, acoustic)
    shared = dx.accelerate(model, dtype=dtype)
    assert shared.decode_from_codes(semantic, acoustic).dtype == wav.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(wav, expected, rtol=0, atol=1e-12)
    else:
        testing.assert_close_to_f64(wav, expected, baseline)
    codes = shared.encode(audio, semantic_repr=feat)[0]
    assert (codes == semantic[..., :60]).float().mean() >= (0.99 if dtype == torch.float64 else 0.8)


def test_edges() -> None:
    model, fast = tiny()
    for batch, frames in ((0, 3), (2, 0)):
        codes = torch.zeros(batch, 1, frames, dtype=torch.int64)
        wav = fast.decode_from_codes(codes, codes.expand(-1, 3, -1))
        assert wav.shape == (batch, 1, model.output_samples(frames))
        audio, feat = torch.zeros(batch, 1, frames * 30), torch.zeros(batch, 20, frames)
        semantic, acoustic = fast.encode(audio, semantic_repr=feat)
        assert semantic.shape == (batch, 1, frames) and acoustic.shape == (batch, 3, frames)


def test_feature_frames_may_be_one_or_two_short() -> None:
    model, fast = tiny()
    audio, feat = inputs(model, 9)
    for frames in (9, 8, 7):
        codes = fast.encode(audio, semantic_repr=feat[..., :frames])
        expected = model.encode(audio, semantic_repr=feat[..., :frames])
        assert all(torch.equal(a, b) for a, b in zip(codes, expected, strict=True))
    for frames in (6, 10):
        with pytest.raises(ValueError, match=r"semantic_repr must have .* 9 frames or up to 2 fewer, got"):
            fast.encode(audio, semantic_repr=torch.zeros(1, 20, frames))


def test_errors_are_the_references() -> None:
    _, fast = tiny()
    audio, feat = torch.zeros(1, 1, 90), torch.zeros(1, 20, 3)
    for call, text in (
        (lambda: fast.encode(audio), "semantic_repr must be"),
        (lambda: fast.encode(audio[0], semantic_repr=feat), "audio_data must be"),
        (lambda: fast.encode(audio, 0, semantic_repr=feat), "num_quantizers must be at least 1, got 0"),
        (
            lambda: fast.encode(audio, sample_rate=16000, semantic_repr=feat),
            "sample_rate must be the model's 24000",
        ),
        (lambda: fast.encode(audio, semantic_repr=feat, lengths=torch.tensor([91])), "lengths must be in"),
        (lambda: fast.decode_from_codes(torch.full((1, 1, 3), 130)), r"codes must be in \[0, 130\), got 130"),
        (lambda: fast.decode_from_codes(torch.zeros(1, 1, 3)), "semantic_codes must be"),
        (
            lambda: fast.decode_from_codes(torch.zeros(1, 1, 3).long(), torch.zeros(1, 4, 3).long()),
            "acoustic_codes must",
        ),
    ):
        with pytest.raises(ValueError, match=text) as raised:
            call()
        assert "\n" not in str(raised.value)
    fast.train()
    with pytest.raises(RuntimeError, match="must be in eval mode"):
        fast.encode(audio, semantic_repr=feat)


def decoded(model: reference.DualCodec) -> Tensor:
    codes = torch.arange(6).reshape(1, 1, 6)
    return model.decode_from_codes(codes, codes.expand(-1, 3, -1))


def test_reference_backend_is_the_reference() -> None:
    model, fast = tiny()
    audio, feat = inputs(model, 5)
    with dx.backend("reference"):
        assert torch.equal(decoded(fast), decoded(model))
        ours, theirs = fast.encode(audio, semantic_repr=feat), model.encode(audio, semantic_repr=feat)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert fast._engine_state is None


def test_packed_weights_are_about_as_large_as_the_weights() -> None:
    _, fast = tiny(encoder_dim=32, decoder_dim=256)
    decoded(fast)
    parameters = sum(p.numel() * 4 for p in fast.parameters())
    assert fast._engine_state[1].engine.weight_bytes() < 1.6 * parameters


# from_pretrained


def test_load_checkpoint(tmp_path: Any) -> None:
    model, _ = tiny()
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    fresh = dx.DualCodec(**testing.TINY).eval()
    fresh.load_checkpoint(path)
    assert torch.equal(decoded(fresh), decoded(dx.accelerate(model)))
    state = model.state_dict()
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    wrong_shape = {**state, "semantic_vq.quantizers.0.codebook.weight": torch.zeros(131, 8)}
    missing = {k: v for k, v in state.items() if k != "convnext_encoder.0.weight_g"}
    for content, text in (
        (missing, r"must have this model's parameters, it lacks convnext_encoder\.0\.weight_g \(1 such\)"),
        ({**state, "more": torch.zeros(1)}, r"it has more \(1 such\)"),
        (wrong_shape, r"codebook\.weight must be \[130, 8\], got \[131, 8\]"),
    ):
        save_file(content, path)
        with pytest.raises(dx.DualCodecError, match=text):
            fresh.load_checkpoint(path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(dx.DualCodecError, match="must be a readable safetensors file"):
        fresh.load_checkpoint(path)
    with pytest.raises(dx.DualCodecError, match="it does not exist"):
        fresh.load_checkpoint(tmp_path / "none.safetensors")
    assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items()), "a failed load changes nothing"


def test_from_pretrained(tmp_path: Any) -> None:
    settings = settings_of("12hz_v1")
    model = dx.DualCodec(**settings)
    testing.seed_model(model)
    path = tmp_path / "dualcodec_12hz_16384_4096.safetensors"
    save_file(model.state_dict(), path)
    expected = model.state_dict()["dac.decoder.model.0.weight_g"]
    for arguments in (("12hz_v1", tmp_path), ("12hz_v1", path), (path, None), (tmp_path, None)):
        loaded = dx.DualCodec.from_pretrained(arguments[0], weights=arguments[1], dtype=torch.bfloat16)
        assert not loaded.training and loaded.compute_dtype == torch.bfloat16
        assert torch.equal(loaded.state_dict()["dac.decoder.model.0.weight_g"], expected.bfloat16())
    with pytest.raises(dx.DualCodecError):
        dx.DualCodec.from_pretrained("25hz_v1", weights=tmp_path)
    with pytest.raises(dx.DualCodecError):
        dx.DualCodec.from_pretrained("12hz_v9", weights=tmp_path)
