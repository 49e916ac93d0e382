"""The reference model against the PyPI package: both presets at full size, and odd settings in float64."""

import os
import random
import subprocess
import sys

import pytest
import torch

from dualcodec_ext import reference as R
from dualcodec_ext.testing import (
    assert_close,
    compare_codes,
    make_features,
    make_inputs,
    make_speech,
    rvq_margin_bound,
    seed_model,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
]

# Upstream's semantic decoder always ends in 1024 channels, so latent_dim must be that for it to run.
ODD = {
    "rates 3 5 7, one codebook, 33 entries": {
        "encoder_rates": [3, 5, 7],
        "decoder_rates": [7, 5, 3],
        "n_codebooks": 1,
        "codebook_size": 33,
        "is_causal": True,
    },
    "list codebook_dim, rates of unequal count": {
        "encoder_rates": [3, 10],
        "decoder_rates": [5, 2, 3],
        "n_codebooks": 3,
        "codebook_dim": [8, 3, 11],
        "codebook_size": 40,
        "quantizer_dropout": 0.5,
    },
    "un-decoded semantic latent": {
        "encoder_rates": [2, 4],
        "decoder_rates": [4, 2],
        "n_codebooks": 2,
        "codebook_size": 16,
        "decode_semantic_for_codec": False,
        "convnext_dim": 1024,
        "quantizer_dropout": 1.0,
    },
}
ODD_COMMON = {
    "encoder_dim": 8,
    "latent_dim": 1024,
    "decoder_dim": 24,
    "semantic_codebook_size": 70,
    "convnext_dim": 16,
    "convnext_layers": 1,
    "sample_rate": 24000,
}


def make_pair(peer_class, settings, dtype):
    """The same seeded parameters in both, loaded strictly both ways."""
    ours, theirs = R.DualCodec(**settings).to(dtype).eval(), peer_class(**settings).to(dtype).eval()
    seed_model(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    seed_model(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


@pytest.fixture(scope="module", params=["12hz_v1", "25hz_v1"])
def preset_pair(request, peer_class, preset_model):
    ours = preset_model(request.param)
    known = peer_class.__init__.__code__.co_varnames
    theirs = peer_class(**{k: v for k, v in ours.settings.items() if k in known}).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def test_preset_gives_the_codes_and_the_audio_of_the_pypi_package(preset_pair):
    ours, theirs = preset_pair
    hop = ours.dac.hop_length
    frames = 14000 // hop
    audio, feat = make_speech(frames * hop + 100), make_features(frames)  # one frame short
    with torch.no_grad():
        theirs_semantic, theirs_acoustic = theirs.encode(audio, semantic_repr=feat)
        semantic, acoustic = ours.encode(audio, semantic_repr=feat)
        latent, _ = ours._semantic(feat)
        z = ours.dac._residual(ours.dac.preprocess(audio, None), latent)
    assert semantic.shape == (1, 1, frames) and acoustic.shape == (1, ours.dac.n_codebooks, frames)
    # Two float32 models: their residuals differ by some hundred roundings, relative to their size.
    for codes, theirs_codes, x, rvq in (
        (semantic, theirs_semantic, ours.convnext_encoder(feat), ours.semantic_vq),
        (acoustic, theirs_acoustic, z, ours.dac.quantizer),
    ):
        tensors = rvq.op_tensors(torch.float32)
        searched, _, margins = R.rvq_search_ref(x, **tensors, return_margin=True)
        bound = rvq_margin_bound(x, **tensors, relative_error=2.0**-17)
        compare_codes(searched, codes, margins, bound)
        report = compare_codes(theirs_codes, codes, margins, bound)
        assert report.equal >= 0.9 * report.total, report
    assert torch.equal(ours.semantic_quantize(feat), theirs.semantic_quantize(feat))
    audio_ours = ours.decode_from_codes(semantic, acoustic)
    assert audio_ours.shape[-1] == frames * hop - 4
    assert 0.05 < audio_ours.std() < 0.6
    assert_close(audio_ours, theirs.decode_from_codes(semantic, acoustic), 2e-5)
    assert_close(ours.decode_from_codes(semantic, None), theirs.decode_from_codes(semantic, None), 2e-5)


@pytest.mark.parametrize("quantizers", [1, 3, None])
def test_preset_with_fewer_quantizers(preset_pair, quantizers):
    ours, theirs = preset_pair
    audio, feat = make_speech(3 * ours.dac.hop_length), make_features(3)
    semantic, acoustic = ours.encode(audio, quantizers, semantic_repr=feat)
    theirs_semantic, theirs_acoustic = theirs.encode(audio, quantizers, semantic_repr=feat)
    assert torch.equal(semantic, theirs_semantic)
    if quantizers == 1:
        assert acoustic is None and theirs_acoustic is None
    else:
        assert acoustic.shape == theirs_acoustic.shape
        assert (acoustic == theirs_acoustic).float().mean() > 0.9


def test_preset_training_forward(preset_pair):
    ours, theirs = preset_pair
    audio, feat = make_speech(4 * ours.dac.hop_length, 2), make_features(4, 2)
    outputs = []
    try:
        for model in (ours, theirs):
            model.train()
            torch.manual_seed(5)
            with torch.no_grad():
                outputs.append(model(audio, semantic_repr=feat, bypass_quantize_rate=0.0))
    finally:
        ours.eval()
    for mine, other in zip(*outputs, strict=True):
        assert set(mine) == set(other)
        for key in ("x", "penalty", "vq/codebook_loss"):
            assert_close(mine[key], other[key], 3e-4)


@pytest.mark.parametrize("settings", ODD.values(), ids=ODD)
def test_odd_settings_give_what_the_pypi_package_gives(peer_class, settings):
    ours, theirs = make_pair(peer_class, ODD_COMMON | settings, torch.float64)
    audio, feat = make_inputs(ours, dtype=torch.float64, short=1)
    semantic, acoustic = ours.encode(audio, semantic_repr=feat)
    theirs_semantic, theirs_acoustic = theirs.encode(audio, semantic_repr=feat)
    assert torch.equal(semantic, theirs_semantic) and torch.equal(acoustic, theirs_acoustic)
    assert len(acoustic.unique()) > 3
    assert_close(ours.decode_from_codes(semantic, acoustic), theirs.decode_from_codes(semantic, acoustic), 1e-11)
    latents = torch.randn(2, 3 + 2 * 8, 5, dtype=torch.float64)
    for mine, other in zip(
        ours.dac.quantizer.from_latents(latents), theirs.dac.quantizer.from_latents(latents), strict=True
    ):
        assert_close(mine, other, 1e-11)


@pytest.mark.parametrize("settings", ODD.values(), ids=ODD)
@pytest.mark.parametrize("training, bypass", [(True, 0.0), (True, 0.5), (True, 1.0), (False, 0.5)])
def test_odd_settings_train_as_the_pypi_package_does(peer_class, settings, training, bypass):
    ours, theirs = make_pair(peer_class, ODD_COMMON | settings, torch.float64)
    audio, feat = make_inputs(ours, frames=5, batch=4, dtype=torch.float64)
    results = []
    for model in (ours, theirs):
        model.train(training)
        random.seed(3)
        torch.manual_seed(3)
        acoustic, semantic = model(audio, semantic_repr=feat, bypass_quantize_rate=bypass, possibly_no_quantizer=True)
        loss = (acoustic.x - audio).square().mean() + semantic.x.square().mean()
        for part in (acoustic, semantic):
            loss = loss + 0.25 * part.penalty + part["vq/codebook_loss"]
        loss.backward()
        results.append((acoustic, semantic, loss, random.random(), torch.rand(1)))
    for mine, other in zip(results[0][:2], results[1][:2], strict=True):
        assert set(mine) == set(other) and mine.metrics == {}
        for key, value in mine.items():
            if isinstance(value, torch.Tensor):
                assert_close(value, torch.as_tensor(other[key]), 1e-10)
            else:
                assert value == other[key], key
    # Both have drawn the same random numbers, no more and no fewer.
    assert results[0][3:] == results[1][3:]
    theirs_grad = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        other = theirs_grad[name]
        if parameter.grad is None or other is None:
            assert (parameter.grad is None or not parameter.grad.any()) and (other is None or not other.any())
        else:
            assert_close(parameter.grad, other, 1e-9 * max(1.0, float(other.abs().max())))


def test_fresh_parameters_are_spread_as_the_pypi_package_spreads_them(peer_class):
    settings = ODD_COMMON | ODD["list codebook_dim, rates of unequal count"]
    torch.manual_seed(0)
    ours, theirs = R.DualCodec(**settings).state_dict(), peer_class(**settings).state_dict()
    for name, value in ours.items():
        assert value.shape == theirs[name].shape
        if value.numel() > 500:
            assert float(value.std()) == pytest.approx(float(theirs[name].std()), rel=0.15), name
        if not theirs[name].any():
            assert not value.any(), name


def test_the_peer_is_found_in_a_folder_with_what_it_imports(tmp_path):
    """A package that is not installed, beside one that it needs; neither can be imported afterwards."""
    package = tmp_path / "dualcodec" / "model_codec"
    package.mkdir(parents=True)
    (tmp_path / "beside_the_peer.py").write_text("NAME = 'beside'\n")
    (package / "dualcodec_model.py").write_text("import beside_the_peer as b\n\nclass DualCodec:\n    name = b.NAME\n")
    code = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "dualcodec" else find_spec(name, *a)
from dualcodec_ext import peer
before = list(sys.path)
print(peer.find_peer()[0].name, sys.path == before, "dualcodec" in sys.modules)
"""
    environment = {**os.environ, "DUALCODEC_EXT_PEERS": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["beside", "True", "False"], done.stderr
