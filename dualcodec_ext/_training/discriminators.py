"""The adversary: discriminators of the waveform folded by periods, and of its spectrum at several resolutions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# A score map and the features of the layers before it.
Verdict = tuple[Tensor, list[Tensor]]
_SLOPE = 0.1


def _conv2d(inputs: int, outputs: int, kernel: tuple[int, int], stride: tuple[int, int]) -> nn.Module:
    padding = (kernel[0] // 2, kernel[1] // 2)
    return nn.utils.parametrizations.weight_norm(nn.Conv2d(inputs, outputs, kernel, stride, padding))


class _Stack(nn.Module):
    def __init__(self, layers: Sequence[nn.Module], last: nn.Module) -> None:
        super().__init__()
        self.layers, self.last = nn.ModuleList(layers), last

    def forward(self, x: Tensor) -> Verdict:
        x = x.contiguous(memory_format=torch.channels_last)
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), _SLOPE)
            features.append(x)
        return self.last(x), features


class PeriodDiscriminator(_Stack):
    """Looks at [B, 1, S] as S / period rows of `period` samples."""

    def __init__(self, period: int, width: int) -> None:
        widths = [1, width, 2 * width, 4 * width, 4 * width]
        layers = [_conv2d(a, b, (5, 1), (3, 1)) for a, b in itertools.pairwise(widths)]
        super().__init__(layers, _conv2d(widths[-1], 1, (3, 1), (1, 1)))
        self.period = period

    def forward(self, x: Tensor) -> Verdict:
        x = F.pad(x, (0, -x.shape[-1] % self.period), mode="reflect")
        return super().forward(x.reshape(x.shape[0], 1, -1, self.period))


class SpectrumDiscriminator(_Stack):
    """Looks at real and imaginary parts of [B, 1, S]'s spectrum, [B, 2, frames, bins]."""

    def __init__(self, window: int, width: int) -> None:
        layers = [
            _conv2d(2, width, (3, 9), (1, 2)),
            _conv2d(width, width, (3, 9), (1, 2)),
            _conv2d(width, 2 * width, (3, 9), (1, 2)),
            _conv2d(2 * width, 2 * width, (3, 3), (1, 1)),
        ]
        super().__init__(layers, _conv2d(2 * width, 1, (3, 3), (1, 1)))
        self.window = window
        self.register_buffer("_hann", torch.hann_window(window), persistent=False)

    def forward(self, x: Tensor) -> Verdict:
        hop = self.window // 4
        frames = F.pad(x[:, 0], (self.window // 2, self.window // 2)).unfold(-1, self.window, hop)
        spectrum = torch.view_as_real(torch.fft.rfft(frames * self.get_buffer("_hann"))) * (2 / self.window**0.5)
        # Speech spans 60 dB: compressed, its quiet parts are seen too.
        size = (spectrum.square().sum(-1, keepdim=True) + 1e-9).sqrt()
        return super().forward((spectrum * size.pow(-0.5)).permute(0, 3, 1, 2))


class Discriminators(nn.Module):
    """All of them.

    Args:
        periods: in samples, one discriminator each.
        windows: in samples, one discriminator each.
        width: channels of their first layers.
    """

    def __init__(
        self, periods: Sequence[int] = (2, 3, 5, 7, 11), windows: Sequence[int] = (512, 1024, 2048), width: int = 16
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(
            [*(PeriodDiscriminator(p, width) for p in periods), *(SpectrumDiscriminator(w, width) for w in windows)]
        )

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Judge x [B, 1, S]: one score map and one list of features per member."""
        verdicts = [member(x) for member in self.members]
        return [score for score, _ in verdicts], [features for _, features in verdicts]
