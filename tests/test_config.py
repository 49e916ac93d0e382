"""DualCodecConfig and the rules of the settings."""

import dataclasses
import inspect
import json
from pathlib import Path

import pytest
import torch

from dualcodec_ext import reference
from dualcodec_ext.config import DualCodecConfig
from dualcodec_ext.testing import TINY


def test_defaults_are_the_models():
    signature = inspect.signature(reference.DualCodec)
    fields = {f.name: f.default for f in dataclasses.fields(DualCodecConfig)}
    assert fields == {name: p.default for name, p in signature.parameters.items()}


def test_presets():
    assert DualCodecConfig.presets() == ("12hz_v1", "25hz_v1", "12hz_causal", "12hz_lookahead", "12hz_stream", "tiny")
    v12, v25 = DualCodecConfig.preset("12hz_v1"), DualCodecConfig.preset("25hz_v1")
    assert (v12.hop_length, v12.frame_rate_hz, v12.latent_channels, v12.n_codebooks) == (1920, 12.5, 1024, 7)
    assert (v25.hop_length, v25.frame_rate_hz, v25.latent_channels, v25.n_codebooks) == (960, 25.0, 1024, 11)
    assert v12.encoder_rates == (4, 5, 6, 8, 2) and v12.encoder_dim == 32 and v12.codebook_size == 4096
    assert v25.encoder_dim == 64 and v25.semantic_downsample_factor == 2 and v12.semantic_downsample_factor == 4
    assert v12.is_causal and v25.is_causal and v12.sample_rate == v25.sample_rate == 24000
    kinds = {
        name: (c.decoder_is_causal, c.look_ahead, c.causal_encoder)
        for name in DualCodecConfig.presets()
        for c in [DualCodecConfig.preset(name)]
    }
    assert kinds == {
        "12hz_v1": (False, False, False),
        "25hz_v1": (False, False, False),
        "12hz_causal": (True, False, False),
        "12hz_lookahead": (True, True, False),
        "12hz_stream": (True, False, True),
        "tiny": (True, False, True),
    }
    with pytest.raises(ValueError, match=r"name must be one of 12hz_v1, .*12hz_stream, tiny, got '13hz'"):
        DualCodecConfig.preset("13hz")


def test_preset_settings_are_those_of_the_pypi_package(peer_class):
    # The package's yaml files, read without a yaml reader: they are flat.
    folder = Path(peer_class.__init__.__code__.co_filename).parents[1] / "conf" / "model"
    names = {
        "12hz_v1": "dualcodec_12hz_16384_4096_8vq.yaml",
        "25hz_v1": "dualcodec_25hz_16384_1024_12vq.yaml",
    }
    for preset, name in names.items():
        path = folder / name
        if not path.exists():
            pytest.skip("the package's settings are not installed beside its model")
        text = path.read_text()
        config = DualCodecConfig.preset(preset)
        seen = 0
        for line in text.split("discriminator:")[0].splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key in ("model", "_target_", "SAMPLE_RATE", ""):
                continue
            expected = 24000 if "SAMPLE_RATE" in value else json.loads(value)
            got = getattr(config, key)
            assert (list(got) if isinstance(got, tuple) else got) == expected, key
            seen += 1
        assert seen >= 8


def test_round_trips(tmp_path):
    config = DualCodecConfig.from_dict(TINY)
    assert config.codebook_dim == (8, 5, 8)
    assert DualCodecConfig.from_dict(config.to_dict()) == config
    assert DualCodecConfig.from_json(config.to_json()) == config
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert DualCodecConfig.from_json(path) == DualCodecConfig.from_json(str(path)) == config
    assert hash(config) == hash(DualCodecConfig.from_dict(TINY))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.encoder_dim = 3
    model = reference.DualCodec(**config.to_dict())
    assert model.settings == config.to_dict() | {"latent_dim": 64, "causal_decoder": False}
    assert DualCodecConfig.from_dict(model.settings).latent_channels == config.latent_channels == 64


def test_lists_and_other_integers_are_taken():
    np = pytest.importorskip("numpy")
    config = DualCodecConfig(encoder_rates=[np.int64(4), 2], decoder_rates=torch.Size([8]), encoder_dim=np.int32(8))
    assert config.encoder_rates == (4, 2) and config.decoder_rates == (8,) and type(config.encoder_dim) is int


@pytest.mark.parametrize(
    "settings, error, text",
    [
        (
            {"encoder_rates": [2, 3]},
            ValueError,
            r"multiply to the same hop, got \[2, 3\] = 6 and \[5, 3, 2\] = 30",
        ),
        ({"encoder_rates": []}, ValueError, r"encoder_rates must hold at least one rate, got \[\]"),
        ({"encoder_rates": 8}, TypeError, "encoder_rates must be a list of integers, got 8"),
        ({"encoder_rates": "235"}, TypeError, "encoder_rates must be a list of integers, got '235'"),
        ({"decoder_rates": [5, 0, 2]}, ValueError, r"decoder_rates\[1\] must be at least 1, got 0"),
        ({"decoder_rates": [5, 3.0, 2]}, TypeError, r"decoder_rates\[1\] must be an integer, got 3.0"),
        (
            {"look_ahead": True, "causal_decoder": False},
            ValueError,
            "look_ahead=True needs .* causal_decoder=False",
        ),
        ({"codebook_size": 0}, ValueError, "codebook_size must be at least 1, got 0"),
        ({"semantic_codebook_size": 0}, ValueError, "semantic_codebook_size must be at least 1, got 0"),
        ({"codebook_size": 65537}, ValueError, "codebook_size must be at most 65536, got 65537"),
        ({"semantic_codebook_size": 70000}, ValueError, "semantic_codebook_size must be at most 65536, got 70000"),
        ({"codebook_dim": 65}, ValueError, "codebook_dim must be at most 64, got 65"),
        ({"codebook_dim": [8, 65, 8]}, ValueError, r"codebook_dim\[1\] must be at most 64, got 65"),
        ({"semantic_codebook_dim": 65}, ValueError, "semantic_codebook_dim must be at most 64, got 65"),
        ({"n_codebooks": 0}, ValueError, "n_codebooks must be at least 1, got 0"),
        ({"encoder_dim": -4}, ValueError, "encoder_dim must be at least 1, got -4"),
        ({"encoder_dim": "64"}, TypeError, "encoder_dim must be an integer, got '64'"),
        ({"sample_rate": True}, TypeError, "sample_rate must be an integer, got True"),
        ({"convnext_layers": -1}, ValueError, "convnext_layers must be at least 0, got -1"),
        ({"latent_dim": 0}, ValueError, "latent_dim must be at least 1, got 0"),
        ({"codebook_dim": [8, 8]}, ValueError, "codebook_dim must hold n_codebooks=3 entries, got 2"),
        ({"codebook_dim": [8, 8, 0]}, ValueError, r"codebook_dim\[2\] must be at least 1, got 0"),
        ({"codebook_dim": None}, TypeError, "codebook_dim must be an integer or a list of them, got None"),
        ({"quantizer_dropout": 1.5}, ValueError, r"quantizer_dropout must be in \[0, 1\], got 1.5"),
        ({"quantizer_dropout": None}, TypeError, "quantizer_dropout must be a fraction or a bool, got None"),
        ({"is_causal": 1}, TypeError, "is_causal must be True or False, got 1"),
        ({"causal_decoder": "yes"}, TypeError, "causal_decoder must be True, False or None, got 'yes'"),
        ({"decoder_dim": 7}, ValueError, "decoder_dim is halved .* at least 8, got 7"),
        (
            {"decode_semantic_for_codec": False},
            ValueError,
            "convnext_dim must equal latent_dim .* got convnext_dim=24 and latent_dim=64",
        ),
    ],
)
def test_wrong_settings_raise_one_line(settings, error, text):
    for make in (DualCodecConfig, reference.DualCodec):
        with pytest.raises(error, match=text) as caught:
            make(**(TINY | settings))
        assert "\n" not in str(caught.value)


def test_unknown_names_and_unreadable_files(tmp_path):
    with pytest.raises(ValueError, match=r"settings must be among encoder_dim, .*, got encoder_dims"):
        DualCodecConfig.from_dict({"encoder_dims": 3})
    with pytest.raises(ValueError, match="the given text must be JSON, got: "):
        DualCodecConfig.from_json("{no}")
    path = tmp_path / "list.json"
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"list.json must be an object, got list"):
        DualCodecConfig.from_json(path)
    with pytest.raises(OSError):
        DualCodecConfig.from_json(tmp_path / "none.json")
