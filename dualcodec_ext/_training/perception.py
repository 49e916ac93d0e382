"""Losses after models of hearing: how disturbed speech sounds, and how well its envelopes can be followed.

They are differentiable relatives of what validation scores with (`scores`): `DisturbanceLoss` of PESQ, `EnvelopeLoss`
of STOI. A model trained with them scores higher there than it otherwise would, so its card must say so, and a measure
that neither follows must be looked at too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .losses import SpectralLoss, triangles, waveform_loss
from .recipe import Recipe

_EXPONENT = 0.23  # Zwicker's, of loudness
_LEVEL_DB = 79.0  # sound pressure at which speech is listened to; powers are in units of it
_BESIDE = 50 / 10 ** (_LEVEL_DB / 10)  # P.862's 50 and 1e5, in these units: what is added is compared with it,
_PAUSE = 1e5 / 10 ** (_LEVEL_DB / 10)  # and frames are weighed by it
_FAINT = 0.05  # of a mean loudness; speech has some 0.2
_LIFT = 30.0  # the most by which an envelope is scaled up to the target's
_FLAT = 0.05  # of the swing of the target's envelope; one of less counts less
_QUIETEST = 3e-3  # root mean square of full scale; what is fainter is not lifted to the listening level


class DisturbanceLoss(nn.Module):
    """What of a signal's loudness is missing, and what is heard beside it.

    After the perceptual model of ITU-T P.862: powers in bands of the Bark scale, as loudness by Zwicker's law over the
    threshold in quiet; a quarter of the lesser loudness is masked, of every difference; what is added to the target
    counts once more, the more the further it stands out. Level, delay and colour are not evened out here as they are
    there: the codec is to keep them.

    Args:
        rate_hz: of the signals.
        bands: how many, up to 8 kHz or half of the rate.
    """

    def __init__(self, rate_hz: int, bands: int = 48) -> None:
        super().__init__()
        self.window = round(0.032 * rate_hz)
        frequencies = torch.arange(self.window // 2 + 1, dtype=torch.float64) * rate_hz / self.window
        edges = torch.linspace(0.2, float(_bark(torch.tensor(min(8000.0, rate_hz / 2)))), bands + 2).double()
        bands_of = triangles(_bark(frequencies)[:, None], edges)
        voice = ((frequencies >= 300) & (frequencies <= 3300)).double()
        hann = torch.hann_window(self.window)
        self.register_buffer("_hann", hann, persistent=False)
        self.register_buffer("_bands", torch.cat([bands_of, voice[:, None]], 1).float(), persistent=False)
        self.least = _least(hann, self.window)
        quiet = 10 ** ((_quiet_db(_hertz(edges[1:-1])) - _LEVEL_DB) / 10)
        self.register_buffer("_threshold", quiet.float(), persistent=False)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """Compare x with target, both [B, 1, S].

        Returns:
            The mean over the items of the mean disturbance in units of the target's mean loudness.
        """
        got, wanted = self._powers(x), self._powers(target)
        level = wanted[..., -1:].mean(1, keepdim=True).clamp(min=self.least)  # [B, 1, 1]
        got, wanted = got[..., :-1] / level, wanted[..., :-1] / level
        mine, own = self._loudness(got), self._loudness(wanted)
        difference = mine - own
        heard = (difference.abs() - 0.25 * torch.minimum(mine, own)).clamp(min=0)
        stands_out = ((got + _BESIDE) / (wanted + _BESIDE)).pow(1.2).clamp(max=12)
        added = heard * torch.where(stands_out > 3, stands_out, 0.0)
        weight = (wanted.sum(-1) + _PAUSE).pow(-0.04)
        disturbance = (heard.square().mean(-1) + 1e-8).sqrt() + 0.309 * added.mean(-1)
        return ((disturbance * weight).mean(1) / (own.mean(dim=(1, 2)) + _FAINT)).mean()

    def _powers(self, x: Tensor) -> Tensor:  # [B, 1, S] -> [B, frames, bands + 1], the last of speech's middle
        return _powers(x, self.get_buffer("_hann"), self.window) @ self.get_buffer("_bands")

    def _loudness(self, power: Tensor) -> Tensor:
        threshold = self.get_buffer("_threshold")
        above = (0.5 + 0.5 * power / threshold).pow(_EXPONENT) - 1
        return (2 * threshold).pow(_EXPONENT) * above.clamp(min=0)


class EnvelopeLoss(nn.Module):
    """How little the envelopes of speech, in thirds of an octave, follow those of the target.

    One minus the short-time objective intelligibility of Taal, Hendriks, Heusdens and Jensen (2011): correlations over
    384 ms in 15 bands from 150 Hz up, of frames within 40 dB of the loudest. Items that hold no such stretch do not
    count; where an item is cut short, half a second or more leaves room for some.

    Args:
        rate_hz: of the signals.
    """

    stretch = 30  # frames

    def __init__(self, rate_hz: int) -> None:
        super().__init__()
        self.window = round(0.0256 * rate_hz)
        self.size = 1 << self.window.bit_length()
        frequencies = torch.arange(self.size // 2 + 1, dtype=torch.float64)[:, None] * rate_hz / self.size
        centres = 150 * 2 ** (torch.arange(15, dtype=torch.float64) / 3)
        inside = (frequencies >= centres * 2 ** (-1 / 6)) & (frequencies < centres * 2 ** (1 / 6))
        hann = torch.hann_window(self.window)
        self.register_buffer("_hann", hann, persistent=False)
        self.register_buffer("_bands", inside.float(), persistent=False)
        self.least = _least(hann, self.size)  # a millionth of it keeps slopes finite where there is nothing

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """Compare x with target, both [B, 1, S].

        Returns:
            The mean over what counts, about 0 where the envelopes agree and all bands hold sound.
        """
        got, wanted = self._envelopes(x), self._envelopes(target)
        losses = [0.0 * x.mean()]
        for own, mine in zip(wanted, got, strict=True):
            energy = own.square().sum(-1)
            loud = energy > energy.max().clamp(min=self.least) * 1e-4
            if int(loud.sum()) < self.stretch:
                continue
            a, b = (rows[loud].unfold(0, self.stretch, 1) for rows in (own, mine))  # [stretches, bands, frames]
            b = b * (self._norm(a) / self._norm(b)).clamp(max=_LIFT)
            b = torch.minimum(b, a * (1 + 10 ** (15 / 20)))
            a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
            swing = self._norm(a)
            losses.append(1 - (a * b / (swing * torch.maximum(self._norm(b), _FLAT * swing))).sum(-1).mean())
        return torch.stack(losses).sum() / max(1, len(losses) - 1)

    def _envelopes(self, x: Tensor) -> Tensor:  # [B, 1, S] -> [B, frames, bands]
        return (_powers(x, self.get_buffer("_hann"), self.size) @ self.get_buffer("_bands") + 1e-6 * self.least).sqrt()

    def _norm(self, x: Tensor) -> Tensor:
        return (x.square().sum(-1, keepdim=True) + 1e-6 * self.least).sqrt()


class Comparison(nn.Module):
    """The parts of a recipe's loss that compare two signals.

    Args:
        recipe: whose windows and bands they take; the parts after hearing are left out where their factor is 0.
        rate_hz: of the signals.
    """

    def __init__(self, recipe: Recipe, rate_hz: int) -> None:
        super().__init__()
        self.spectral = SpectralLoss(rate_hz, recipe.windows, recipe.bands, recipe.highest_hz)
        hearing = {"disturbance": DisturbanceLoss, "envelope": EnvelopeLoss}
        self.hearing = nn.ModuleDict({name: kind(rate_hz) for name, kind in hearing.items() if recipe.losses[name]})

    def forward(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return the parts by name, of x and target, both [B, 1, S]."""
        mel, magnitude = self.spectral(x, target)
        parts = {"mel": mel, "magnitude": magnitude, "waveform": waveform_loss(x, target)}
        return parts | {name: loss(x, target) for name, loss in self.hearing.items()}


def _powers(x: Tensor, hann: Tensor, size: int) -> Tensor:
    """Powers [B, frames, size / 2 + 1] of frames that overlap by half; a shorter signal is filled up with zeros."""
    window = hann.numel()
    frames = nn.functional.pad(x[:, 0], (0, max(0, window - x.shape[-1]))).unfold(-1, window, window // 2)
    return torch.view_as_real(torch.fft.rfft(frames * hann, n=size)).square().sum(-1)


def _least(hann: Tensor, size: int) -> float:
    """The power of the quietest speech in a frame, over all frequencies."""
    return _QUIETEST**2 * float(hann.square().sum()) * size / 2


def _bark(hz: Tensor) -> Tensor:
    return 26.81 * hz / (1960 + hz) - 0.53  # Traunmueller (1990)


def _hertz(bark: Tensor) -> Tensor:
    return 1960 * (bark + 0.53) / (26.28 - bark)


def _quiet_db(hz: Tensor) -> Tensor:
    """Threshold in quiet after Terhardt (1979), dB of sound pressure."""
    khz = hz / 1000
    return 3.64 * khz**-0.8 - 6.5 * (-0.6 * (khz - 3.3) ** 2).exp() + 1e-3 * khz**4
