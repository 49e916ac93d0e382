"""Semantic features: resampling, log-mel and w2v-BERT, each against its definition written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from w2v_bert import STATISTICS_FILE, save_w2v_bert, upstream_features

from dualcodec_ext import _w2v_fbank
from dualcodec_ext import _w2v_layers as layers
from dualcodec_ext.errors import DualCodecError, MissingExtraError
from dualcodec_ext.semantic import LogMelFeatures, W2vBertFeatures, resample, resample_24k_to_16k
from dualcodec_ext.testing import make_speech

pytestmark = pytest.mark.usefixtures("one_thread")


# Resampling -----------------------------------------------------------------------------------------------------


def slow_resample(x: np.ndarray, orig_hz: int, new_hz: int) -> np.ndarray:
    """The definition, one output at a time: the sum over all inputs of a Hann-windowed sinc around its time."""
    common = math.gcd(orig_hz, new_hz)
    orig, new = orig_hz // common, new_hz // common
    cutoff = min(orig, new) * 0.99
    out = np.zeros(math.ceil(len(x) * new / orig))
    for n in range(len(out)):
        t = (np.arange(len(x)) * new - n * orig) / (orig * new) * cutoff
        weight = np.where(abs(t) < 6, np.cos(t * math.pi / 12) ** 2, 0.0) * np.sinc(t) * cutoff / orig
        out[n] = (x * weight).sum()
    return out


RATES = [(24000, 16000), (16000, 24000), (44100, 24000), (48000, 24000), (24000, 44100), (8000, 24000), (7, 5)]


@pytest.mark.parametrize(("orig_hz", "new_hz"), RATES)
def test_resample_is_the_definition(orig_hz, new_hz):
    x = np.random.default_rng(0).uniform(-1, 1, (2, 1000))
    expected = np.stack([slow_resample(row, orig_hz, new_hz) for row in x])
    exact = resample(torch.from_numpy(x), orig_hz, new_hz)
    np.testing.assert_allclose(exact.numpy(), expected, rtol=0, atol=1e-12)
    single = resample(torch.from_numpy(x).float()[:, None], orig_hz, new_hz)
    assert single.dtype == torch.float32 and single.shape == (2, 1, expected.shape[1])
    np.testing.assert_allclose(single[:, 0].numpy(), expected, rtol=0, atol=1e-6)  # worst seen: 4e-7


@pytest.mark.parametrize("samples", [0, 1, 2, 6, 7, 63])
def test_resample_short_signals(samples):
    x = np.random.default_rng(1).uniform(-1, 1, samples)
    got = resample_24k_to_16k(torch.from_numpy(x)[None, None])
    assert got.shape == (1, 1, math.ceil(samples * 2 / 3))
    np.testing.assert_allclose(got[0, 0].numpy(), slow_resample(x, 24000, 16000), rtol=0, atol=1e-12)


def test_resample_gradient():
    x = torch.randn(2, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: resample(y, 3, 2), (x,))


def test_resample_dtypes_strides_and_autocast():
    x = make_speech(2400, batch=2)
    expected = resample_24k_to_16k(x)
    assert resample(x, 24000, 24000) is x
    assert torch.equal(resample_24k_to_16k(x.transpose(0, 2).contiguous().transpose(0, 2)), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(resample_24k_to_16k(x), expected)
    half = resample_24k_to_16k(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, resample_24k_to_16k(x.bfloat16().float()).bfloat16())
    assert resample(x[:0], 24000, 16000).shape == (0, 1, 1600)


def test_resample_refuses():
    with pytest.raises(DualCodecError, match=r"^resample: orig_hz must be a whole number of Hz, got 0$"):
        resample(torch.zeros(3), 0, 16000)
    with pytest.raises(DualCodecError, match=r"^resample: new_hz must be a whole number of Hz, got 0.5$"):
        resample(torch.zeros(3), 1, 0.5)
    with pytest.raises(DualCodecError, match=r"^resample: audio must be \[..., S\] float, got \[3\] torch.int64$"):
        resample(torch.zeros(3, dtype=torch.int64), 1, 2)


# Log-mel --------------------------------------------------------------------------------------------------------


def slow_log_mel(x: np.ndarray, factor: int) -> np.ndarray:
    """The definition in float64: 100 Hz windows that end where their frame ends, bands, log, stack, average."""
    frames = math.ceil(len(x) / (480 * factor))
    padded = np.concatenate([np.zeros(360), x, np.zeros(frames * 480 * factor - len(x))])
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(600) / 600)
    mel_of = lambda hz: 1127 * np.log(1 + hz / 700)  # noqa: E731
    edges = 700 * (np.exp(np.linspace(mel_of(20), mel_of(12000), 82) / 1127) - 1)
    hz = np.arange(513) * 24000 / 1024
    bands = np.stack([np.interp(hz, edges[k : k + 3], [0, 1, 0], left=0, right=0) for k in range(80)])
    rows = []
    for k in range(2 * frames * factor):
        power = abs(np.fft.rfft(padded[240 * k : 240 * k + 600] * window, 1024)) ** 2
        rows.append(np.log(bands @ power + 1e-5))
    at_50_hz = (np.reshape(rows, (-1, 160)) + 3) / 4
    return at_50_hz.reshape(frames, factor, 160).mean(axis=1).T


@pytest.mark.parametrize(("factor", "samples"), [(1, 4800), (4, 24000), (2, 961), (4, 1)])
def test_log_mel_is_the_definition(factor, samples):
    audio = make_speech(samples)
    got = LogMelFeatures(factor)(audio)
    assert got.shape == (1, 160, math.ceil(samples / (480 * factor))) and got.dtype == torch.float32
    expected = slow_log_mel(audio[0, 0].double().numpy(), factor)
    np.testing.assert_allclose(got[0].numpy(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("factor", [1, 4])
def test_log_mel_sees_no_later_sample(factor):
    features = LogMelFeatures(factor)
    hop = features.hop_samples
    assert hop == 480 * factor
    audio = make_speech(20 * hop)
    whole = features(audio)
    for frame in (0, 1, 7, 18):
        end = (frame + 1) * hop
        later = audio.clone()
        later[..., end:] = torch.randn(20 * hop - end, generator=torch.Generator().manual_seed(frame))
        changed = features(later)
        assert torch.equal(changed[..., : frame + 1], whole[..., : frame + 1])
        assert not torch.equal(changed[..., frame + 1], whole[..., frame + 1])
        later[..., end - 1] += 0.5  # and the bound is tight: the frame's own last sample but one counts
        later[..., end - 2] += 0.5
        assert not torch.equal(features(later)[..., frame], whole[..., frame])
        assert torch.equal(features(audio[..., :end]), whole[..., : frame + 1])


def test_log_mel_bits_in_a_batch_and_any_layout():
    features = LogMelFeatures(4)
    audio = make_speech(30000, batch=3)
    whole = features(audio)
    for item in range(3):
        assert torch.equal(features(audio[item : item + 1]), whole[item : item + 1])
    strided = torch.stack([audio, audio], dim=-1)[..., 0]
    assert torch.equal(features(strided), whole)
    assert torch.equal(features(audio.double()), whole)
    assert features(audio[:0]).shape == (0, 160, 16)
    assert features(audio[..., :0]).shape == (3, 160, 0)


class _Largest(TorchDispatchMode):
    """Keeps the most bytes that a result has had."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.most = max(self.most, result.numel() * result.element_size())
        return result


@pytest.mark.parametrize("factor", [1, 4])
def test_log_mel_of_a_long_clip_works_on_a_stretch_at_a_time(factor, monkeypatch):
    features = LogMelFeatures(factor)
    audio = make_speech(24000 * 60 + 77)
    with _Largest() as largest:
        whole = features(audio)
    assert largest.most <= 8 << 20, "neither windows nor spectra of the whole clip"
    clips = make_speech(24000 * 3, batch=2)
    together = features(clips)
    for stretch in (1, 6, 123):
        monkeypatch.setattr(LogMelFeatures, "_STRETCH", stretch)
        assert torch.equal(features(clips), together)
    assert torch.equal(features(audio[..., : 24000 * 2]), whole[..., : 100 // factor])


def test_log_mel_statistics_are_fixed():
    features = LogMelFeatures()
    audio = make_speech(9600)
    assert sorted(features.state_dict()) == ["mean", "variance"]
    raw = features(audio) * 4 - 3
    loud = features(torch.cat([audio, 10 * audio], dim=-1)) * 4 - 3
    torch.testing.assert_close(loud[..., :20], raw, rtol=0, atol=0)
    mean, variance = raw.mean(dim=(0, 2)), raw.var(dim=(0, 2))
    features.set_statistics(mean, variance)
    copy = LogMelFeatures()
    copy.load_state_dict(features.state_dict())
    normal = copy(audio)
    torch.testing.assert_close(normal.mean(dim=(0, 2)), torch.zeros(160), rtol=0, atol=1e-4)
    torch.testing.assert_close(normal.var(dim=(0, 2)), torch.ones(160), rtol=1e-3, atol=0)
    assert features(torch.zeros(1, 1, 4800)).isfinite().all()
    audio.requires_grad_()
    features(audio).sum().backward()
    assert audio.grad.isfinite().all() and audio.grad.abs().max() > 0


def test_log_mel_refuses():
    with pytest.raises(
        DualCodecError, match=r"^LogMelFeatures: downsample_factor must be a whole number from 1, got 0$"
    ):
        LogMelFeatures(0)
    with pytest.raises(DualCodecError, match=r"^LogMelFeatures: audio must be \[B, 1, S\] float, got \[1, 2, 5\]"):
        LogMelFeatures()(torch.zeros(1, 2, 5))
    with pytest.raises(DualCodecError, match=r"set_statistics: mean must be \[160\], got \[80\]$"):
        LogMelFeatures().set_statistics(torch.zeros(80), torch.ones(160))
    with pytest.raises(DualCodecError, match=r"set_statistics: variance must be positive, got 0.0$"):
        LogMelFeatures().set_statistics(torch.zeros(160), torch.zeros(160))


# w2v-BERT -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("transformers")
    return save_w2v_bert(tmp_path_factory.mktemp("w2v"))


def features_of(folder, **settings) -> W2vBertFeatures:
    return W2vBertFeatures(folder, folder, **{"autocast": False, **settings})


@pytest.mark.parametrize(("batch", "samples", "factor"), [(1, 24000, 4), (3, 12345, 4), (2, 30000, 2), (1, 24000, 1)])
def test_w2v_features_are_hidden_state_17(folder, batch, samples, factor):
    audio = make_speech(samples, batch=batch)
    got = features_of(folder, downsample_factor=factor)(audio)
    plain, exact = (upstream_features(folder, audio, factor, dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert got.dtype == torch.float32 and got.shape == exact.shape
    error, of_plain = got - exact, plain - exact
    assert error.square().mean() < 4 * of_plain.square().mean()
    assert error.abs().max() < 5e-5  # worst seen: 1.6e-5


def test_w2v_features_round_as_plain_pytorch(folder):
    """Twice plain PyTorch's error at most: over all clips in RMS, of the middle clip in its largest.

    Nineteen layers carry one early rounding through a whole clip, so that a single clip's errors in two orders of
    addition may differ by several times either way: a batch's largest one was 0.5 to 4.7 of PyTorch's. Over 64 clips
    every instruction set was at 1.1 to 1.2 in RMS, and at 0.95 to 1.0 in the middle clip's.
    """
    audio = make_speech(12345, batch=24, seed=1)
    got = features_of(folder, downsample_factor=1)(audio)
    plain, exact = (upstream_features(folder, audio, 1, dtype=dtype) for dtype in (torch.float32, torch.float64))
    error, of_plain = got - exact, plain - exact
    assert error.square().mean() < 4 * of_plain.square().mean()
    assert (error.abs().amax((1, 2)) / of_plain.abs().amax((1, 2))).median() < 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_w2v_features_are_the_same_alone_and_in_a_batch(folder, dtype):
    if layers._own(torch.zeros(16, 2, dtype=dtype)) is None:
        pytest.skip("the linear layers are oneDNN's here, which promises no such thing")
    features, audio = features_of(folder, autocast=dtype), make_speech(30000, batch=3)
    together = features(audio)
    for i in range(3):
        assert torch.equal(features(audio[i : i + 1]), together[i : i + 1])


@pytest.mark.parametrize("padding_value", [0.0, 1.0])
@pytest.mark.parametrize("samples", [560, 719, 720, 880, 5000, 160160])
def test_w2v_energies_are_the_extractors(samples, padding_value):
    transformers = pytest.importorskip("transformers")
    extractor = transformers.SeamlessM4TFeatureExtractor(padding_value=padding_value)
    audio = make_speech(samples, sample_rate_hz=16000)[0, 0]
    expected = extractor(audio.numpy(), sampling_rate=16000, return_tensors="pt")
    assert _w2v_fbank.takes(extractor)
    features, mask = _w2v_fbank.fbank(extractor, audio)
    torch.testing.assert_close(features, expected["input_features"][0], rtol=0, atol=1e-5)  # measured: equal
    assert torch.equal(mask, expected["attention_mask"][0].to(torch.int64))


def test_w2v_extractors_of_another_kind_are_called():
    transformers = pytest.importorskip("transformers")

    class Own(transformers.SeamlessM4TFeatureExtractor):
        pass

    for other in (Own(), transformers.SeamlessM4TFeatureExtractor(padding_side="left"), lambda audio: audio):
        assert not _w2v_fbank.takes(other)


def test_w2v_model_stops_after_layer_17(folder, capfd, caplog):
    features = features_of(folder)
    features(make_speech(24000))
    assert len(features._load()[0].layers) == 17
    # Nothing is said about the two layers left out.
    printed = capfd.readouterr()
    assert "layers" not in printed.out + printed.err + caplog.text


def test_w2v_adapter_and_dtype_of_the_checkpoint_do_not_matter(tmp_path):
    pytest.importorskip("transformers")
    settings = {"add_adapter": True, "use_intermediate_ffn_before_adapter": True}
    folder = save_w2v_bert(tmp_path, layers=17, half=True, **settings)
    audio = make_speech(24000)
    features = features_of(folder)
    torch.testing.assert_close(features(audio), upstream_features(folder, audio, 4), rtol=0, atol=1e-5)


def test_w2v_autocast(folder):
    audio = make_speech(12000, batch=2)
    exact = features_of(folder)(audio)
    got = features_of(folder, autocast=torch.float16)(audio)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, upstream_features(folder, audio, 4, torch.float16), rtol=0, atol=1e-5)
    assert 1e-5 < (got - exact).abs().max() < 0.05


def test_w2v_bfloat16_is_no_further_off_than_autocast(folder):
    audio = make_speech(24000, batch=4)
    exact = upstream_features(folder, audio, 4)
    got = features_of(folder, autocast=torch.bfloat16)(audio)
    assert got.dtype == torch.float32
    error = (got - exact).square().mean().sqrt()
    autocast = (upstream_features(folder, audio, 4, torch.bfloat16) - exact).square().mean().sqrt()
    assert 1e-3 < error < 1.1 * autocast


@pytest.mark.parametrize("without", [None, "own", "oneDNN", "kernels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_w2v_layers_pack_or_do_without(folder, monkeypatch, dtype, without):
    audio = make_speech(24000)
    if without == "kernels":
        monkeypatch.setattr("dualcodec_ext._w2v_layers._kernel", lambda name: None)
    if without in ("own", "oneDNN"):
        monkeypatch.setattr("dualcodec_ext._w2v_layers._own", lambda weight: None)
    if without == "oneDNN":
        monkeypatch.setattr("dualcodec_ext._w2v_layers._pack", lambda weight: None)
    got = features_of(folder, autocast=dtype)(audio)
    expected = upstream_features(folder, audio, 4)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.4)


def test_w2v_of_another_kind_runs_as_transformers_has_it(tmp_path):
    pytest.importorskip("transformers")
    folder = save_w2v_bert(tmp_path, hidden_act="gelu")
    audio = make_speech(12000)
    features = features_of(folder)
    torch.testing.assert_close(features(audio), upstream_features(folder, audio, 4), rtol=0, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in features._load()[0].parameters())


def test_w2v_autocast_true_on_a_cpu(folder, monkeypatch):
    audio = make_speech(12000)
    for has_float16, expected in ((False, None), (True, torch.float16)):
        monkeypatch.setattr("dualcodec_ext._w2v_bert._cpu_computes_float16", lambda has=has_float16: has)
        features = features_of(folder, autocast=True)
        assert features.autocast_dtype is expected
        assert torch.equal(features(audio), features_of(folder, autocast=expected or False)(audio))
        assert W2vBertFeatures(device="cuda").autocast_dtype is torch.float16
    assert features_of(folder, autocast=torch.float32).autocast_dtype is None
    with pytest.raises(DualCodecError, match=r"^autocast must be a bool, .*, got torch.float64$"):
        features_of(folder, autocast=torch.float64)


def test_w2v_padded_batch_gives_what_each_clip_gives(folder):
    features = features_of(folder)
    audio = make_speech(24000, batch=4)
    sizes = [24000, 15600, 7, 0]
    padded = features(audio, torch.tensor(sizes))
    for item, size in enumerate(sizes):
        alone = features(audio[item : item + 1, :, :size])
        frames = alone.shape[-1]
        torch.testing.assert_close(padded[item : item + 1, :, :frames], alone, rtol=0, atol=1e-4)
        assert not padded[item, :, frames:].any()
    with pytest.raises(DualCodecError, match=r"lengths must be \[4\] in \[0, 24000\], got \[1\]$"):
        features(audio, torch.tensor([1]))


@pytest.mark.parametrize("samples", [0, 1, 500, 839, 1500, 2100, 2400])
def test_w2v_short_clips(folder, samples):
    got = features_of(folder)(make_speech(2400)[..., :samples])
    assert got.shape[:2] == (1, 32) and got.shape[-1] in ((0,) if samples < 2000 else (0, 1))
    assert got.isfinite().all()
    assert features_of(folder)(torch.zeros(0, 1, samples)).shape == (0, 32, 0)


def test_w2v_loads_nothing_before_it_is_called(monkeypatch):
    features = W2vBertFeatures("/nowhere/w2v", "/nowhere/statistics")
    assert not features.is_loaded
    with pytest.raises(DualCodecError, match=r"^checkpoint: /nowhere/w2v must be a directory, it does not exist$"):
        features(torch.zeros(1, 1, 2400))
    monkeypatch.setattr("dualcodec_ext.errors.importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"transformers: pip install 'dualcodec-ext\[semantic\]'$"):
        features(torch.zeros(1, 1, 2400))
    assert not features.is_loaded


def test_w2v_refuses_what_is_wrong(folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    audio = make_speech(2400)

    def fails(w2v, statistics, match):
        with pytest.raises(DualCodecError, match=match):
            W2vBertFeatures(w2v, statistics)(audio)

    fails(folder, tmp_path, rf"must be a directory that holds {STATISTICS_FILE}, it does not$")
    (tmp_path / STATISTICS_FILE).write_bytes(b"no such thing")
    fails(folder, tmp_path, r"^statistics: .* must be a torch file with the tensors mean and var, it is not$")
    torch.save({"mean": torch.zeros(5), "var": torch.ones(5)}, tmp_path / STATISTICS_FILE)
    fails(folder, tmp_path, r"^statistics: .* must hold 32 numbers, .*, got 5$")
    fails(tmp_path, folder, r"^w2v_path: .* must hold config.json, it does not$")

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = load_file(broken / "model.safetensors")
    del weights["encoder.layers.3.ffn1.output_dense.bias"]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    fails(broken, folder, r"^w2v_path: .* lacks encoder.layers.3.ffn1.output_dense.bias \(1 such\)$")
    (broken / "model.safetensors").write_bytes(b"no such thing")
    fails(broken, folder, r"^w2v_path: .* must hold a Wav2Vec2BertModel: ")

    shallow = save_w2v_bert(tmp_path / "shallow", layers=3)
    fails(shallow, shallow, r"^w2v_path: the model must have at least 17 layers, got 3$")
    with pytest.raises(DualCodecError, match=r"^W2vBertFeatures: audio must be \[B, 1, S\] float, got \[2400\]"):
        W2vBertFeatures(folder, folder)(audio[0, 0])
