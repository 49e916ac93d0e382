"""Semantic features for the command line: w2v-BERT's where there are weights, else log-mel through a matrix."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from dualcodec_ext.errors import DualCodecError, MissingExtraError
from dualcodec_ext.ops import snake_conv1d
from dualcodec_ext.semantic import CODEC_RATE_HZ, LogMelFeatures, W2vBertFeatures, resample
from dualcodec_ext.windows import WHOLE_S, FeatureWindows

if TYPE_CHECKING:
    from dualcodec_ext._cli.options import ModelOptions
    from dualcodec_ext.config import DualCodecConfig
    from dualcodec_ext.model import DualCodec

_FEATURE_RATE_HZ = 50
_W2V = "hf://facebook/w2v-bert-2.0"
_STATISTICS = "w2vbert2_mean_var_stats_emilia.pt"


class Features:
    """Turns audio into semantic features at the model's frame rate.

    Args:
        name: what the features are, for code files.
        config: the model's settings.
    Raises:
        DualCodecError: the model's frames are no whole number of the features' frames.
    """

    def __init__(self, name: str, config: DualCodecConfig) -> None:
        self.name = name
        self.config = config
        if config.frame_rate_hz * config.semantic_downsample_factor != _FEATURE_RATE_HZ:
            raise DualCodecError(
                f"semantic features come at {_FEATURE_RATE_HZ} Hz: semantic_downsample_factor must be "
                f"{_FEATURE_RATE_HZ / config.frame_rate_hz:g} for {config.frame_rate_hz:g} frames per second, "
                f"got {config.semantic_downsample_factor}"
            )

    def __call__(self, audio: Tensor) -> Tensor:
        """Computes the features of one recording.

        Args:
            audio: float32 [1, 1, S] at the model's rate.
        Returns:
            float32 [1, semantic_dim, F]; w2v-BERT's may be a frame short of the recording.
        """
        return self._compute(resample(audio, self.config.sample_rate, CODEC_RATE_HZ))

    def _compute(self, audio: Tensor) -> Tensor:  # [1, 1, S] at 24 kHz
        raise NotImplementedError

    def stream(self) -> FeatureStream:
        """Returns what gives the features of a recording as its audio comes."""
        raise NotImplementedError


class FeatureStream(Protocol):
    """Audio at the model's rate in, [1, 1, n]; features out, [1, semantic_dim, k]."""

    def write(self, audio: Tensor) -> Tensor:
        """Takes in audio, and returns the features that can be known by now."""
        ...

    def finish(self) -> Tensor:
        """Returns the rest."""
        ...


class NearFeatures:
    """Features whose frames depend on the audio of the frames beside them alone.

    Args:
        features: gives those of a whole recording.
        ahead: frames of audio that one needs behind it.
    """

    def __init__(self, features: Features, ahead: int) -> None:
        self._features, self._ahead = features, ahead
        self._hop = features.config.hop_length
        self._held = torch.zeros(1, 1, 0)  # from the frame before the next one on
        self._next = 0  # frame to compute, from the front of what is held

    def write(self, audio: Tensor) -> Tensor:
        self._held = torch.cat([self._held, audio], -1)
        there = self._held.shape[-1] // self._hop - self._ahead
        if there <= self._next:
            return torch.zeros(1, self._features.config.semantic_dim, 0)
        found = self._features(self._held[..., : (there + self._ahead) * self._hop])[..., self._next : there]
        self._held, self._next = self._held[..., (there - 1) * self._hop :].clone(), 1
        return found

    def finish(self) -> Tensor:
        return self._features(self._held)[..., self._next :]


class LogMel(Features):
    """Features that are made of log-mel ones, frame by frame."""

    def stream(self) -> FeatureStream:
        return NearFeatures(self, 0 if self.config.sample_rate == CODEC_RATE_HZ else 1)


class SeededFeatures(LogMel):
    """Log-mel features through a matrix of random numbers: shaped like w2v-BERT's, with none of their meaning.

    Args:
        config: the model's settings.
        seed: of the matrix.
    """

    def __init__(self, config: DualCodecConfig, seed: int) -> None:
        super().__init__(f"log-mel, matrix seeded:{seed}", config)
        self._mel = LogMelFeatures(config.semantic_downsample_factor)
        generator = torch.Generator().manual_seed(seed)
        # Numbers of variance one keep it.
        channels = LogMelFeatures.channels
        self._matrix = torch.randn(config.semantic_dim, channels, generator=generator) / channels**0.5

    def _compute(self, audio: Tensor) -> Tensor:
        # Not a matmul, whose sums may follow the number of frames.
        return snake_conv1d(self._mel(audio), self._matrix[..., None])


class ModelFeatures(LogMel):
    """The log-mel features that a model computes itself.

    Args:
        config: the model's settings.
        model: has the features' statistics.
    """

    def __init__(self, config: DualCodecConfig, model: DualCodec) -> None:
        super().__init__("log-mel", config)
        self._model = model

    def _compute(self, audio: Tensor) -> Tensor:
        return self._model.semantic_features(audio).cpu()


class W2vFeatures(Features):
    """w2v-BERT 2.0, as `Inference` uses it; loaded at once, so that what is missing is one error and not one per file.

    Args:
        config: the model's settings.
        options: `w2v`, `weights`, dtype and device.
    Raises:
        DualCodecError: a file or a package is missing.
    """

    def __init__(self, config: DualCodecConfig, options: ModelOptions) -> None:
        super().__init__("w2v", config)
        source = options.w2v or _W2V
        dtype = getattr(torch, options.dtype)
        self._model = W2vBertFeatures(
            source,
            statistics_place(source, options.weights),
            downsample_factor=config.semantic_downsample_factor,
            device=options.device,
            autocast=False if dtype == torch.float32 else dtype,
        )
        try:
            channels = self._model(torch.zeros(1, 1, 0)).shape[1]
        except (DualCodecError, MissingExtraError) as error:
            raise DualCodecError(f"semantic features: {error} (--w2v DIR names a folder with w2v-BERT 2.0)") from error
        if channels != config.semantic_dim:
            raise DualCodecError(f"--w2v: {source} gives {channels} channels, the model needs {config.semantic_dim}")

        self._whole_s = math.inf if options.whole_features else WHOLE_S

    def _compute(self, audio: Tensor) -> Tensor:
        return self._model(audio).cpu()

    def stream(self) -> FeatureStream:
        return FeatureWindows(self, self.config.hop_length, self.config.sample_rate, whole_s=self._whole_s)


def features_for(
    config: DualCodecConfig, options: ModelOptions, model: DualCodec | None = None, stand_in: bool = False
) -> Features:
    """Picks the features that the command line asks for.

    Args:
        config: the model's settings.
        options: `w2v`, `weights`, seed, dtype and device.
        model: the codec; one on log-mel features computes its own where --w2v is not given.
        stand_in: take the seeded matrix even with real weights where --w2v is not given: enough to compare
            numbers with.
    Returns:
        The features.
    Raises:
        DualCodecError: the semantic model can't be had.
    """
    if options.w2v is None and model is not None and model.has_front_end:
        return ModelFeatures(config, model)
    if options.w2v is None and (options.weights is None or stand_in):
        return SeededFeatures(config, options.seed or 0)
    return W2vFeatures(config, options)


def statistics_place(w2v: str, weights: str | None) -> str:
    """Where the features' mean and variance are: beside the semantic model, beside the weights, or on the hub."""
    places = [Path(w2v).expanduser()]
    if weights is not None:
        path = Path(weights).expanduser()
        places.append(path if path.is_dir() else path.parent)
    for place in places:
        if (place / _STATISTICS).is_file():
            return str(place)
    return "hf://amphion/dualcodec"
