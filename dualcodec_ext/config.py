"""The settings of a model as a frozen dataclass, and the presets."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .reference import settings as _settings

_V1 = {
    "encoder_rates": (4, 5, 6, 8, 2),
    "decoder_rates": (2, 8, 6, 5, 4),
    "encoder_dim": 32,
    "decoder_dim": 1536,
    "n_codebooks": 7,
    "quantizer_dropout": 1.0,
    "codebook_size": 4096,
    "semantic_codebook_size": 16384,
    "sample_rate": 24000,
    "is_causal": True,
    "semantic_downsample_factor": 4,
}
_PRESETS: dict[str, dict[str, Any]] = {
    "12hz_v1": _V1,
    "25hz_v1": {
        "encoder_rates": (4, 5, 6, 8),
        "decoder_rates": (8, 6, 5, 4),
        "n_codebooks": 11,
        "quantizer_dropout": 1.0,
        "codebook_size": 1024,
        "semantic_codebook_size": 16384,
        "sample_rate": 24000,
        "is_causal": True,
    },
    "12hz_causal": _V1 | {"causal_decoder": True},
    "12hz_lookahead": _V1 | {"causal_decoder": True, "look_ahead": True},
    "12hz_stream": _V1 | {"causal_decoder": True, "causal_encoder": True},
    "tiny": {
        "encoder_rates": (6, 5, 4, 4),
        "decoder_rates": (4, 4, 5, 6),
        "encoder_dim": 8,
        "decoder_dim": 256,
        "latent_dim": 128,
        "n_codebooks": 9,
        "codebook_size": 1024,
        "quantizer_dropout": 0.4,
        "semantic_codebook_size": 2048,
        "sample_rate": 24000,
        "convnext_dim": 128,
        "convnext_layers": 2,
        "convnext_intermediate_dim": 384,
        "is_causal": True,
        "causal_decoder": True,
        "causal_encoder": True,
        "semantic_dim": 160,
        "semantic_downsample_factor": 1,
    },
}


@dataclass(frozen=True)
class DualCodecConfig:
    """Every constructor argument of `DualCodec`, with its default; checked on construction.

    What each one controls is written at `dualcodec_ext.reference.DualCodec`. Lists become tuples.

    Raises:
        TypeError, ValueError: a setting that is wrong or does not fit the others; one line.
    """

    encoder_dim: int = 64
    encoder_rates: tuple[int, ...] = (2, 4, 8, 8)
    latent_dim: int | None = None
    decoder_dim: int = 1536
    decoder_rates: tuple[int, ...] = (8, 8, 4, 2)
    n_codebooks: int = 9
    codebook_size: int = 1024
    semantic_codebook_size: int = 16384
    codebook_dim: int | tuple[int, ...] = 8
    semantic_codebook_dim: int = 8
    quantizer_dropout: bool | float = False
    sample_rate: int = 44100
    distill_projection_out_dim: int = 1024
    convnext_dim: int = 768
    convnext_layers: int = 4
    decode_semantic_for_codec: bool = True
    is_causal: bool = False
    semantic_downsample_factor: int = 2
    look_ahead: bool = False
    causal_decoder: bool | None = None
    causal_encoder: bool = False
    distill: bool = False
    semantic_dim: int = 1024
    convnext_intermediate_dim: int = 2048

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check all settings and bring them to plain types (lists to tuples)."""
        for name, value in _settings.check_settings({f.name: getattr(self, f.name) for f in fields(self)}).items():
            object.__setattr__(self, name, value)

    @classmethod
    def presets(cls) -> tuple[str, ...]:
        """Return the names that `preset` knows."""
        return tuple(_PRESETS)

    @classmethod
    def preset(cls, name: str) -> "DualCodecConfig":
        """Return the settings of a released model, or of one of its causal variants.

        Args:
            name: "12hz_v1" or "25hz_v1" (the released checkpoints), "12hz_causal" or "12hz_lookahead"
                (12hz_v1 with the causal decoder, without and with look-ahead), "12hz_stream" (also with the
                causal encoder), "tiny" (the small causal model that the package brings, on log-mel features).

        Raises:
            ValueError: an unknown name.
        """
        if name not in _PRESETS:
            raise ValueError(f"DualCodecConfig.preset: name must be one of {', '.join(_PRESETS)}, got {name!r}")
        return cls(**_PRESETS[name])

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "DualCodecConfig":
        """Make a configuration from a mapping; names left out keep their defaults.

        Raises:
            ValueError: an unknown name.
        """
        known = [f.name for f in fields(cls)]
        unknown = [str(name) for name in settings if name not in known]
        if unknown:
            raise ValueError(f"DualCodecConfig: settings must be among {', '.join(known)}, got {', '.join(unknown)}")
        return cls(**settings)

    @classmethod
    def from_json(cls, source: str | Path) -> "DualCodecConfig":
        """Make a configuration from a JSON object: its text (beginning with "{") or the path of its file.

        Raises:
            OSError: the file cannot be read.
            ValueError: not a JSON object, or an unknown name.
        """
        inline = isinstance(source, str) and source.lstrip().startswith("{")
        where = "the given text" if inline else str(source)
        try:
            settings = json.loads(str(source) if inline else Path(source).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"DualCodecConfig.from_json: {where} must be JSON, got: {error}") from None
        if not isinstance(settings, dict):
            raise ValueError(f"DualCodecConfig.from_json: {where} must be an object, got {type(settings).__name__}")
        return cls.from_dict(settings)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as keyword arguments for `DualCodec`."""
        return asdict(self)

    def to_json(self) -> str:
        """Return the settings as JSON text that `from_json` reads."""
        return json.dumps(self.to_dict(), indent=2)

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return math.prod(self.encoder_rates)

    @property
    def frame_rate_hz(self) -> float:
        """Frames per second."""
        return self.sample_rate / self.hop_length

    @property
    def latent_channels(self) -> int:
        """Channels of the acoustic latent: latent_dim, or the encoder's last width."""
        return _settings.latent_channels(self.to_dict())

    @property
    def decoder_is_causal(self) -> bool:
        """Whether the decoder is the causal one: causal_decoder, or where it is None look_ahead."""
        return _settings.decoder_is_causal(self.to_dict())
