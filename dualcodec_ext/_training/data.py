"""Speech for training: every file below a folder in memory, and batches that depend on the seed and the step alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .._files import find_inputs
from ..audio import AUDIO_SUFFIXES, read_audio
from ..errors import DualCodecError
from ..semantic import resample

# Pitch and tempo together, as a tape would: what a few speakers lack of the range of voices.
SPEEDS = ((1, 1), (1, 1), (4, 5), (5, 6), (7, 8), (8, 9), (9, 8), (8, 7), (6, 5), (5, 4))
_QUIET_RMS = 0.003  # -50 dBFS: a pause, of which a batch needs few
_TRIES = 4
_FULL_SCALE = 32767.0


@dataclass(frozen=True)
class Voice:
    """One speaker's recordings, end to end.

    Args:
        name: of the speaker's folder.
        samples: int16 [T] at the model's rate.
        weight: how often this voice is drawn, relative to the others.
    """

    name: str
    samples: np.ndarray
    weight: float


def load_voices(folder: Path, rate_hz: int, weights: Mapping[str, float] | None = None) -> list[Voice]:
    """Read all audio files below a folder; each of its own folders is one speaker.

    Args:
        folder: what it holds directly belongs to one speaker more.
        rate_hz: the model's; files of another rate are resampled.
        weights: by the beginning of a speaker's name, a factor on how often it is drawn.

    Returns:
        The voices, sorted by name. A voice weighs the root of its length, times its factor.

    Raises:
        DualCodecError: a file can't be read, or there is none.
    """
    files, failed = find_inputs([str(folder)], AUDIO_SUFFIXES)
    if failed or not files:
        raise DualCodecError(f"train: {folder} must be a folder with audio files below it, it is not")
    by_name: dict[str, list[np.ndarray]] = {}
    for file in files:
        audio = read_audio(file.path)
        at_rate = resample(torch.from_numpy(audio.samples), audio.sample_rate_hz, rate_hz)
        whole = (at_rate.clamp(-1, 1) * _FULL_SCALE).round().to(torch.int16).numpy()
        name = file.relative.parts[0] if len(file.relative.parts) > 1 else "."
        by_name.setdefault(name, []).append(whole)
    voices = []
    for name, parts in sorted(by_name.items()):
        samples = np.concatenate(parts)
        factor = next((value for start, value in (weights or {}).items() if name.startswith(start)), 1.0)
        voices.append(Voice(name, samples, factor * len(samples) ** 0.5))
    return voices


def hours(voices: list[Voice], rate_hz: int) -> float:
    """Return how many hours of audio the voices hold."""
    return sum(len(voice.samples) for voice in voices) / rate_hz / 3600


class Batches:
    """Random segments of random voices, varied in speed, loudness, colour and noise.

    Args:
        voices: what to draw from.
        batch: items per batch.
        samples: per item.
        seed: of everything drawn.
        augment: vary the segments; else they come as they are.

    Attributes:
        too_short: the names of voices that no segment fits in; they are not drawn.
    """

    def __init__(self, voices: list[Voice], batch: int, samples: int, seed: int, augment: bool = True) -> None:
        longest = max(num / den for num, den in SPEEDS) if augment else 1.0
        self._voices = [voice for voice in voices if len(voice.samples) > longest * samples + 64]
        self.too_short = [voice.name for voice in voices if all(voice is not kept for kept in self._voices)]
        if not self._voices:
            raise DualCodecError(f"train: a voice must last longer than {int(longest * samples) + 64} samples")
        total = sum(voice.weight for voice in self._voices)
        self._odds = [voice.weight / total for voice in self._voices]
        self._batch, self._samples, self._seed, self._augment = batch, samples, seed, augment

    def at(self, step: int) -> Tensor:
        """Return the batch of a step, [B, 1, S] float32: the same for the same seed and step."""
        rng = np.random.default_rng([self._seed, step])
        return torch.stack([self._item(rng) for _ in range(self._batch)])

    def _item(self, rng: np.random.Generator) -> Tensor:  # [1, S]
        for _ in range(_TRIES):
            voice = self._voices[rng.choice(len(self._voices), p=self._odds)]
            num, den = SPEEDS[rng.integers(len(SPEEDS))] if self._augment else (1, 1)
            wanted = -(-self._samples * num // den)
            start = int(rng.integers(len(voice.samples) - wanted + 1))
            cut = voice.samples[start : start + wanted]
            if np.sqrt(np.mean((cut / _FULL_SCALE) ** 2)) > _QUIET_RMS:
                break
        x = resample(torch.from_numpy(cut.astype(np.float32) / _FULL_SCALE), num, den)[: self._samples]
        return (_vary(x, rng) if self._augment else x)[None]


def _vary(x: Tensor, rng: np.random.Generator) -> Tensor:  # [S] -> [S]
    tilt = float(rng.uniform(-0.4, 0.4))  # a microphone's colour, by one tap
    x = x + tilt * torch.nn.functional.pad(x, (1, 0))[:-1]
    if rng.random() < 0.3:
        noise = torch.from_numpy(rng.standard_normal(len(x), dtype=np.float32))
        noise = noise + 0.9 * torch.nn.functional.pad(noise, (1, 0))[:-1] * float(rng.random())
        below_db = float(rng.uniform(20, 50))
        x = x + noise * (x.square().mean().sqrt() * 10 ** (-below_db / 20))
    x = x * float((-1) ** rng.integers(2) * 10 ** (rng.uniform(-14, 4) / 20))
    return x * min(1.0, 0.99 / max(1e-9, float(x.abs().max())))


def long_enough(voices: list[Voice], samples: int) -> tuple[list[Voice], list[str]]:
    """Return the voices of at least so many samples, and the names of the others."""
    kept = [voice for voice in voices if len(voice.samples) >= samples]
    return kept, [voice.name for voice in voices if len(voice.samples) < samples]


def stretches(voices: list[Voice], samples: int, most: int) -> Iterator[tuple[str, Tensor]]:
    """Cut evenly spaced stretches out of every voice: name and [1, 1, samples], `most` in all, of each voice one."""
    each = max(1, most // len(voices))
    for voice in voices:
        last = len(voice.samples) - samples
        for start in np.linspace(0, max(0, last), each + 2, dtype=np.int64)[1:-1]:
            cut = voice.samples[start : start + samples].astype(np.float32) / _FULL_SCALE
            yield voice.name, torch.from_numpy(cut).reshape(1, 1, -1)
