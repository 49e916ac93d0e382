"""What training makes small: distances of spectra and waveforms, and the discriminators' verdict."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_FLOOR = 1e-5


class SpectralLoss(nn.Module):
    """Distance of log-mel and of linear spectra over several windows.

    Args:
        rate_hz: of the signals.
        windows: samples per Hann window; the hop is a quarter.
        bands: mel bands per window.
        highest_hz: upper end of the mel bands; the linear part looks at all frequencies.
    """

    def __init__(
        self, rate_hz: int, windows: Sequence[int], bands: Sequence[int], highest_hz: float | None = None
    ) -> None:
        super().__init__()
        self.windows = tuple(windows)
        for window, count in zip(windows, bands, strict=True):
            self.register_buffer(f"_window_{window}", torch.hann_window(window), persistent=False)
            matrix = _mel_matrix(rate_hz, window, count, highest_hz or rate_hz / 2)
            self.register_buffer(f"_mel_{window}", matrix, persistent=False)

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Compare x with target, both [B, 1, S].

        Returns:
            The mean distance of log10 mel magnitudes, and that of linear magnitudes in units of the target's mean one.
        """
        mel = magnitude = x.new_zeros(())
        for window in self.windows:
            a, b = self._spectrum(x, window), self._spectrum(target, window)
            matrix = self.get_buffer(f"_mel_{window}")
            mel = mel + (_log(a @ matrix) - _log(b @ matrix)).abs().mean()
            level = b.mean(dim=(1, 2), keepdim=True) + 1e-3
            magnitude = magnitude + ((a - b).abs() / level).mean()
        return mel / len(self.windows), magnitude / len(self.windows)

    def _spectrum(self, x: Tensor, window: int) -> Tensor:  # [B, 1, S] -> [B, frames, bins]
        hann = self.get_buffer(f"_window_{window}")
        frames = nn.functional.pad(x[:, 0], (window // 2, window // 2)).unfold(-1, window, window // 4)
        power = torch.view_as_real(torch.fft.rfft(frames * hann)).square().sum(-1)
        return (power + 1e-9).sqrt()


def waveform_loss(x: Tensor, target: Tensor) -> Tensor:
    """Return the mean of |x - target| per item [B, 1, S] in units of the target's root mean square."""
    level = target.square().mean(dim=(1, 2), keepdim=True).sqrt() + 1e-2
    return ((x - target).abs() / level).mean()


def discriminator_loss(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Return the least-squares loss of the discriminators: real scores to 1, made ones to 0."""
    losses = [(1 - r).square().mean() + f.square().mean() for r, f in zip(real, fake, strict=True)]
    return torch.stack(losses).mean()


def generator_loss(fake: Sequence[Tensor]) -> Tensor:
    """Return the least-squares loss of what is to be taken for real."""
    return torch.stack([(1 - f).square().mean() for f in fake]).mean()


def feature_loss(real: Sequence[Sequence[Tensor]], fake: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the mean distance of the discriminators' inner features, in units of the real ones' mean size."""
    losses = [
        (f - r.detach()).abs().mean() / (r.detach().abs().mean() + 1e-3)
        for rs, fs in zip(real, fake, strict=True)
        for r, f in zip(rs, fs, strict=True)
    ]
    return torch.stack(losses).mean()


def triangles(places: Tensor, edges: Tensor) -> Tensor:
    """Weights [places, bands] that rise from an edge to 1 at the next and fall to 0 at the one after; places [N, 1]."""
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    return torch.minimum((places - low) / (centre - low), (high - places) / (high - centre)).clamp(min=0)


def _log(x: Tensor) -> Tensor:
    return x.clamp(min=_FLOOR).log10()


def _mel_matrix(rate_hz: int, window: int, bands: int, highest_hz: float) -> Tensor:
    """Triangles [bins, bands] that each sum to one, so that a band's size does not depend on its width."""

    def to_mel(hz: Tensor) -> Tensor:
        return 1127 * torch.log1p(hz / 700)

    bins = to_mel(torch.arange(window // 2 + 1, dtype=torch.float64) * rate_hz / window)[:, None]
    edges = torch.linspace(0, float(to_mel(torch.tensor(highest_hz))), bands + 2, dtype=torch.float64)
    rows, centre = triangles(bins, edges), edges[1:-1]
    # A band narrower than the bins' spacing may hold none: the nearest bin stands in.
    nearest = (bins - centre).abs().argmin(dim=0)
    empty = rows.sum(dim=0) == 0
    rows[nearest[empty], empty.nonzero()[:, 0]] = 1.0
    return (rows / rows.sum(dim=0)).to(torch.float32)
