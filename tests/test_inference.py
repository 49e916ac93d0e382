"""get_model and Inference: the PyPI package's entry points, its README's example among them."""

from __future__ import annotations

import logging
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file
from torch import Tensor

import dualcodec_ext as dx
from dualcodec_ext import hub, semantic, testing
from dualcodec_ext.errors import DualCodecError

# The PyPI package's README, "Alternative usage with local checkpoints", word for word but for the import.
EXAMPLE = """
import dualcodec_ext as dualcodec

w2v_path = "./w2v-bert-2.0" # your downloaded path
dualcodec_model_path = "./dualcodec_ckpts" # your downloaded path
model_id = "12hz_v1" # select from available Model_IDs, "12hz_v1" or "25hz_v1"

dualcodec_model = dualcodec.get_model(model_id, dualcodec_model_path)
dualcodec_inference = dualcodec.Inference(dualcodec_model=dualcodec_model, dualcodec_path=dualcodec_model_path, w2v_path=w2v_path, device="cuda")

# do inference for your wav
import torchaudio
audio, sr = torchaudio.load("YOUR_WAV.wav")
# resample to 24kHz
audio = torchaudio.functional.resample(audio, sr, 24000)
audio = audio.reshape(1,1,-1)
audio = audio.to("cuda")
# extract codes, for example, using 8 quantizers here:
semantic_codes, acoustic_codes = dualcodec_inference.encode(audio, n_quantizers=8)
# semantic_codes shape: torch.Size([1, 1, T])
# acoustic_codes shape: torch.Size([1, n_quantizers-1, T])

# produce output audio. If `acoustic_codes=None` is passed, will decode only semantic codes (RVQ-1)
out_audio = dualcodec_inference.decode(semantic_codes, acoustic_codes)

# save output audio
torchaudio.save("out.wav", out_audio.cpu().squeeze(0), 24000)
"""  # noqa: E501


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user has downloaded: 12hz_v1's checkpoint, the statistics and w2v-BERT, all of random numbers.

    w2v-BERT has its real width, as the codec needs it, and few and narrow layers otherwise.
    """
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("user")
    codec, w2v = folder / "dualcodec_ckpts", folder / "w2v-bert-2.0"
    codec.mkdir()
    model = testing.seeded_model(dx.DualCodecConfig.preset("12hz_v1").to_dict())
    save_file(model.state_dict(), codec / hub.RELEASED_FILES["12hz_v1"])
    generator = torch.Generator().manual_seed(0)
    statistics = {"mean": torch.randn(1024, generator=generator), "var": torch.rand(1024, generator=generator) + 0.5}
    torch.save(statistics, codec / "w2vbert2_mean_var_stats_emilia.pt")
    torch.manual_seed(0)
    config = transformers.Wav2Vec2BertConfig(
        hidden_size=1024, num_hidden_layers=18, num_attention_heads=2, intermediate_size=32
    )
    transformers.Wav2Vec2BertModel(config).half().save_pretrained(w2v)
    transformers.SeamlessM4TFeatureExtractor(stride=2).save_pretrained(w2v)
    return folder


@pytest.fixture(scope="module")
def codec(checkpoints: Path) -> dx.DualCodec:
    return dx.get_model("12hz_v1", checkpoints / "dualcodec_ckpts")


def inference(checkpoints: Path, codec: dx.DualCodec, **options: Any) -> dx.Inference:
    return dx.Inference(codec, checkpoints / "dualcodec_ckpts", checkpoints / "w2v-bert-2.0", device="cpu", **options)


def test_the_readme_example(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchaudio (not a dependency) is soundfile here; without a GPU, "cuda" means the CPU to the tensor."""
    torchaudio: Any = types.ModuleType("torchaudio")
    torchaudio.functional = types.SimpleNamespace(resample=semantic.resample)

    def load(path: str) -> tuple[Tensor, int]:
        data, rate = soundfile.read(path, dtype="float32", always_2d=True)
        return torch.from_numpy(data.T.copy()), rate

    torchaudio.load = load
    torchaudio.save = lambda path, audio, rate: soundfile.write(path, audio.numpy().T, rate)
    monkeypatch.setitem(sys.modules, "torchaudio", torchaudio)
    monkeypatch.chdir(checkpoints)
    soundfile.write("YOUR_WAV.wav", testing.make_speech(32000, sample_rate_hz=16000)[0, 0].numpy(), 16000)
    names: dict[str, Any] = {}
    if torch.cuda.is_available():
        exec(EXAMPLE, names)
    else:
        real = Tensor.to
        monkeypatch.setattr(Tensor, "to", lambda self, *a, **k: self if a == ("cuda",) else real(self, *a, **k))
        with pytest.warns(UserWarning, match="CUDA is not available, running on CPU"):
            exec(EXAMPLE, names)
    frames = names["semantic_codes"].shape[-1]
    assert frames in (24, 25) and names["semantic_codes"].shape == (1, 1, frames)
    assert names["acoustic_codes"].shape == (1, 7, frames)
    written, rate = soundfile.read("out.wav")
    assert rate == 24000 and len(written) == 1920 * frames - 4
    assert np.abs(written).max() > 0.01


def test_encode_is_features_then_codes(checkpoints: Path, codec: dx.DualCodec) -> None:
    """What upstream computes: w2v-BERT's features, then the model's codes; checked on the plain reference."""
    audio = testing.make_speech(24000, 2)
    infer = inference(checkpoints, codec, autocast=False)
    features = infer.semantic(audio)
    codes = infer.encode(audio)
    with dx.backend("reference"):
        expected = codec.encode(audio, 8, semantic_repr=features)
    for ours, theirs in zip(codes, expected, strict=True):
        assert (ours == theirs).float().mean() > 0.99
    assert torch.equal(infer.decode(*codes), infer.decode_from_codes(*codes))
    assert infer.decode(*codes).dtype == torch.float32


@pytest.mark.parametrize("quantizers", [1, 3])
def test_a_list_of_clips_gives_what_each_gives_alone(checkpoints: Path, codec: dx.DualCodec, quantizers: int) -> None:
    infer = inference(checkpoints, codec, autocast=False)
    lengths = (9600, 500, 24001, 1919, 7000)  # 500: too short for a frame of features
    clips = [testing.make_speech(n, seed=n)[0] for n in lengths]
    clips[2] = clips[2][0]
    found = infer.encode(clips, quantizers)
    for clip, pair in zip(clips, found, strict=True):
        own = infer.encode(clip.reshape(1, 1, -1), quantizers)
        assert torch.equal(pair[0], own[0]) and (pair[1] is None) == (quantizers == 1)
        assert pair[1] is None or torch.equal(pair[1], own[1])
    assert infer.encode([], quantizers) == []
    assert torch.equal(infer.encode(clips[:1], quantizers)[0][0], found[0][0])


def test_a_wrong_clip_is_one_line(checkpoints: Path, codec: dx.DualCodec) -> None:
    infer = inference(checkpoints, codec)
    for clip, got in ((torch.zeros(2, 100), r"\[2, 100\]"), (torch.tensor(1.0), r"\[\]"), ([0.0], "list")):
        with pytest.raises(DualCodecError, match=rf"clip 1 must be \[S\], \[1, S\] or \[1, 1, S\], got {got}"):
            infer.encode([torch.zeros(100), clip])


def test_n_quantizers(checkpoints: Path, codec: dx.DualCodec) -> None:
    audio = testing.make_speech(9600)
    infer = inference(checkpoints, codec, autocast=False)
    whole = infer.encode(audio)
    for n in (1, 3, 8):
        semantic_codes, acoustic_codes = infer.encode(audio, n_quantizers=n)
        assert torch.equal(semantic_codes, whole[0])
        assert acoustic_codes is None if n == 1 else torch.equal(acoustic_codes, whole[1][:, : n - 1])
        assert infer.decode(semantic_codes, acoustic_codes).shape[-1] == 1920 * whole[0].shape[-1] - 4


@pytest.mark.parametrize("autocast", [True, torch.bfloat16])
def test_autocast(checkpoints: Path, codec: dx.DualCodec, autocast: Any) -> None:
    audio = testing.make_speech(12000)
    plain = inference(checkpoints, codec, autocast=False).encode(audio)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # around it all, as callers have it: the search stays float32
        codes = inference(checkpoints, codec, autocast=autocast).encode(audio)
    assert codes[0].shape == plain[0].shape and codes[1].shape == plain[1].shape
    assert (codes[0] == plain[0]).float().mean() > 0.5


def test_decoding_needs_no_semantic_model(codec: dx.DualCodec) -> None:
    infer = dx.Inference(codec, "nowhere", "nowhere either", device="cpu")
    codes = torch.zeros(1, 1, 3, dtype=torch.int64)
    assert infer.decode(codes, None).shape == (1, 1, 1920 * 3 - 4)
    assert not infer.semantic.is_loaded
    with pytest.raises(dx.DualCodecError, match="nowhere either"):
        infer.encode(testing.make_speech(9600))


def test_falls_back_to_the_cpu(codec: dx.DualCodec) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.warns(UserWarning, match="CUDA is not available, running on CPU"):
        assert dx.Inference(codec).device == "cpu"


def test_works_on_the_pypi_packages_model(checkpoints: Path) -> None:
    from dualcodec_ext.peer import find_peer

    peer_class, why = find_peer()
    if peer_class is None:
        pytest.skip(why)
    known = ("encoder_dim", "encoder_rates", "decoder_dim", "decoder_rates", "n_codebooks", "codebook_size")
    settings = dx.DualCodecConfig.preset("12hz_v1").to_dict()
    peer = peer_class(
        **{k: settings[k] for k in known},
        is_causal=True,
        semantic_downsample_factor=4,
        sample_rate=24000,
    ).eval()
    testing.seed_model(peer)
    audio = testing.make_speech(9600)
    theirs = inference(checkpoints, peer, autocast=False).encode(audio)
    ours = inference(checkpoints, dx.accelerate(peer), autocast=False).encode(audio)
    assert all((a == b).float().mean() > 0.98 for a, b in zip(ours, theirs, strict=True))


def test_get_model(checkpoints: Path, tmp_path: Path) -> None:
    with pytest.raises(dx.DualCodecError, match="model_id must be one of 12hz_v1, 25hz_v1"):
        dx.get_model("13hz")
    with pytest.raises(dx.DualCodecError, match=r"dualcodec_25hz_16384_1024\.safetensors"):
        dx.get_model("25hz_v1", checkpoints / "dualcodec_ckpts")
    with pytest.raises(dx.DualCodecError):
        dx.get_model("12hz_v1", tmp_path / "none")
    with pytest.warns(UserWarning, match="model will be loaded without weights"):
        assert not dx.get_model("12hz_v1", None).training


def test_hub_names(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """hf:// goes through huggingface_hub, which is asked for the released file; without it, the extra is named."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked: list[tuple[Any, ...]] = []
    name = hub.RELEASED_FILES["12hz_v1"]

    def download(repo_id: str, filename: str, **options: Any) -> str:
        asked.append((repo_id, filename, options.get("revision")))
        return str(checkpoints / "dualcodec_ckpts" / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for source in ("hf://amphion/dualcodec", "amphion/dualcodec", "hf://amphion/dualcodec@main"):
        assert hub.find_checkpoint(source, "12hz_v1").name == name
    assert [a[:2] for a in asked] == [("amphion/dualcodec", name)] * 3 and asked[-1][2] == "main"
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "huggingface_hub" else real(n, *a))
    with pytest.raises(dx.MissingExtraError, match=r"needs huggingface_hub: pip install 'dualcodec-ext\[hub\]'"):
        hub.find_checkpoint("hf://amphion/dualcodec", "12hz_v1")


def test_a_local_source_says_which_model_it_is(tmp_path: Path) -> None:
    """A released file's name or a config.json beside the file gives the settings; what is missing is named."""
    folder = tmp_path / "ckpts"
    folder.mkdir()
    preset = dx.DualCodecConfig.preset
    with pytest.raises(dx.DualCodecError, match=r"^checkpoint: .* must hold .*, got no safetensors file$"):
        hub.resolve_pretrained(folder)
    own = folder / "own.safetensors"
    own.touch()
    with pytest.raises(dx.DualCodecError, match=r"own\.safetensors must have a released file's name or a config\.json"):
        hub.resolve_pretrained(folder)
    (folder / "config.json").write_text(preset("12hz_causal").to_json())
    assert hub.resolve_pretrained(folder) == (preset("12hz_causal"), own)
    assert hub.resolve_pretrained("12hz_stream", folder) == (preset("12hz_stream"), own)
    for name in ("25hz_v1", "12hz_v1"):  # where both are there, the package's default model is meant
        released = folder / hub.RELEASED_FILES[name]
        released.touch()
        assert hub.resolve_pretrained(folder) == hub.resolve_pretrained(str(released)) == (preset(name), released)
        assert hub.resolve_pretrained(name, folder) == (preset(name), released)
    assert hub.find_checkpoint(own, "12hz_v1") == own
    with pytest.raises(dx.DualCodecError, match=r"must be a preset \(12hz_v1, .*\), a directory, .*, got 13hz$"):
        hub.resolve_pretrained("13hz")
    with pytest.raises(dx.DualCodecError, match=r"12hz_causal has no released weights"):
        hub.resolve_pretrained("12hz_causal")
    with pytest.raises(dx.DualCodecError, match=r"weights goes with a preset's name"):
        hub.resolve_pretrained(folder, own)
    missing = tmp_path / "none"
    with pytest.raises(
        dx.DualCodecError, match=r"none must be a directory .*hf download amphion/dualcodec dualcodec_12hz"
    ):
        hub.find_checkpoint(str(missing), "12hz_v1")


def test_hub_failures_are_one_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    client = pytest.importorskip("huggingface_hub")
    theirs = logging.getLogger("huggingface_hub.utils._http")

    def offline(*args: Any, **options: Any) -> str:
        theirs.warning("retrying in 1 s")
        raise client.utils.LocalEntryNotFoundError("no network\nand no cache")

    monkeypatch.setattr(client, "hf_hub_download", offline)
    with pytest.raises(dx.DualCodecError, match=r"could not be fetched from the hub: no network \(.*hf download.*\)$"):
        hub.resolve_pretrained("hf://someone/codec")
    monkeypatch.setattr(client, "snapshot_download", offline)
    with pytest.raises(dx.DualCodecError, match=r"facebook/w2v-bert-2\.0 could not be fetched .*: no network"):
        hub.find_directory("hf://facebook/w2v-bert-2.0", ["*.json"])
    assert not caplog.records
    theirs.warning("told again")
    with pytest.raises(dx.DualCodecError, match=r"a hub path must be hf://owner/name, got hf://codec$"):
        hub.find_checkpoint("hf://codec", "12hz_v1")
    assert hub.HubName.parse("ckpts/missing.safetensors") is None  # a mistyped file, and no repository
    assert hub.HubName.parse("./owner/name") is hub.HubName.parse("a/b/c") is hub.HubName.parse("/a/b") is None
    assert hub.HubName.parse("hf://a/b@v1/c/d.safetensors") == ("a/b", "c/d.safetensors", "v1")


def test_keyword_arguments_of_upstreams(codec: dx.DualCodec) -> None:
    with pytest.warns(UserWarning, match="ignored unknown arguments layer$"):
        infer = dx.Inference(codec, device="cpu", meanvar_fname="other.pt", layer=3)
    assert infer.semantic.meanvar_fname == "other.pt"


def test_a_model_with_its_own_features_needs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither transformers nor a path: the codes are those of the model's own `encode`, of clips in a list too."""
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "transformers" else find(n, *a))
    model = dx.get_model("tiny")
    infer = dx.Inference(model, "nowhere", "nowhere either", device="cpu")
    audio = testing.make_speech(12345, 2)
    for n in (1, 8):
        for ours, own in zip(infer.encode(audio, n), model.encode(audio, n), strict=True):
            assert (ours is None and own is None) or torch.equal(ours, own)
    clips = [audio[0], audio[1, 0, :7000], audio[:1, :, :0]]
    for clip, (semantic_codes, acoustic_codes) in zip(clips, infer.encode(clips), strict=True):
        own = model.encode(clip.reshape(1, 1, -1), 8)
        assert torch.equal(semantic_codes, own[0]) and torch.equal(acoustic_codes, own[1])
    assert infer.decode(*infer.encode(audio)).shape == (2, 1, 480 * 26)
    assert not infer.semantic.is_loaded
    with pytest.raises(ValueError, match=r"^Inference\.encode: audio must be \[B, 1, S\] float, got \[2, 12345\] "):
        infer.encode(audio[:, 0])


def test_get_model_finds_the_model_in_the_package(tmp_path: Path) -> None:
    found, wanted = (model.state_dict() for model in (dx.get_model("tiny"), dx.DualCodec.from_pretrained("tiny")))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)
    save_file(found, tmp_path / "own.safetensors")
    assert not dx.get_model("tiny", tmp_path / "own.safetensors").training
    with pytest.raises(dx.DualCodecError, match=r"none\.safetensors"):
        dx.get_model("tiny", tmp_path / "none.safetensors")
