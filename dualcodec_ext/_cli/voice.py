"""A few seconds of speech to try the codec on: a speech synthesiser's where there is one, else generated vowels."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from dualcodec_ext.audio import Audio, read_audio
from dualcodec_ext.errors import DualCodecError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

SENTENCE = "Hello. Twelve and a half frames a second carry this sentence."
# Mean formants of American English men in Hz (Peterson and Barney 1952); the fourth is a common fixed choice.
_VOWELS = {
    "i": (270, 2290, 3010, 3500),
    "e": (530, 1840, 2480, 3500),
    "a": (730, 1090, 2440, 3500),
    "o": (570, 840, 2410, 3500),
    "u": (300, 870, 2240, 3500),
}
_BANDWIDTHS_HZ = (60, 90, 150, 250)
_FRAME_S = 0.005


def speak(sentence: str = SENTENCE) -> tuple[Audio, str]:
    """Speaks a sentence with espeak-ng or flite, or generates vowels where neither is on the PATH.

    Args:
        sentence: English text.
    Returns:
        The recording and what it is, in a few words.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "speech.wav")
        for program, arguments in (
            ("espeak-ng", ["-v", "en", "-w", str(target), sentence]),
            ("flite", ["-t", sentence, "-o", str(target)]),
        ):
            found = shutil.which(program)
            if found is None:
                continue
            try:
                subprocess.run([found, *arguments], check=True, capture_output=True, timeout=60)
                return read_audio(target), f'"{sentence}", spoken by {program}'
            except (OSError, subprocess.SubprocessError, DualCodecError):
                continue  # installed but without a voice, say: the next one may work
    return vowels(), "a generated vowel sequence (neither espeak-ng nor flite is installed)"


def vowels(sequence: str = "aieoua", sample_rate_hz: int = 24000, vowel_s: float = 0.4, seed: int = 0) -> Audio:
    """Generates vowels by adding up the harmonics of a voice, each as loud as the vocal tract lets it through.

    Args:
        sequence: letters of `aeiou`.
        sample_rate_hz: rate of the result.
        vowel_s: seconds per vowel, glides to the next one among them.
        seed: of the breath noise and of the small irregularities of the pitch.
    Returns:
        len(sequence) * vowel_s seconds, peak 0.6.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    samples = round(len(sequence) * vowel_s * sample_rate_hz)
    frames = max(2, round(len(sequence) * vowel_s / _FRAME_S))
    time_s = np.arange(frames) * _FRAME_S
    # Formants stay for most of a vowel and glide to the next one in its last quarter.
    at = np.array([[i * vowel_s, (i + 0.75) * vowel_s] for i in range(len(sequence))]).ravel()
    targets = np.repeat(np.array([_VOWELS[v] for v in sequence], dtype=float), 2, axis=0)
    formants = np.stack([np.interp(time_s, at, targets[:, k]) for k in range(targets.shape[1])])
    # The pitch falls over the phrase and wavers a little, as voices do.
    pitch = np.interp(time_s, [0, 0.3 * time_s[-1], time_s[-1]], [115, 140, 90]) * (1 + 0.01 * np.sin(33 * time_s))
    pitch *= 1 + 0.004 * rng.standard_normal(frames)

    clock = np.arange(samples) / sample_rate_hz
    phase = 2 * np.pi * np.cumsum(np.interp(clock, time_s, pitch)) / sample_rate_hz
    voice = np.zeros(samples)
    for k in range(1, int(sample_rate_hz / 2 / pitch.max())):
        loudness = _tract(k * pitch, formants) / k  # a glottal pulse loses 12 dB per octave, lips give 6 back
        voice += np.interp(clock, time_s, loudness) * np.sin(k * phase)
    breath = 0.01 * np.abs(voice).max() * rng.standard_normal(samples) * (0.5 + 0.5 * np.sin(phase))
    fade = np.clip(np.minimum(clock, clock[::-1]) / 0.03, 0, 1)
    signal = (voice + breath) * fade
    return Audio((0.6 * signal / np.abs(signal).max()).astype(np.float32), sample_rate_hz, 1)


def _tract(
    frequency_hz: npt.NDArray[np.float64],  # [frames]
    formants_hz: npt.NDArray[np.float64],  # [formants, frames]
) -> npt.NDArray[np.float64]:
    """Gain of resonators in series at one frequency per frame."""
    import numpy as np

    gain = np.ones_like(frequency_hz)
    for formant, bandwidth in zip(formants_hz, _BANDWIDTHS_HZ, strict=True):
        gain *= formant**2 / np.hypot(formant**2 - frequency_hz**2, bandwidth * frequency_hz)
    return gain
