"""Audio files: any format, rate and channel count in; mono samples at the model's rate out, and back."""

from __future__ import annotations

import contextlib
import io
import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualcodec_ext._files import reason, write_atomic
from dualcodec_ext.errors import DualCodecError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Samples = npt.NDArray[np.float32]

# Name endings that a folder is searched for. A file that is named outright is tried whatever it is called.
AUDIO_SUFFIXES = (
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".aifc", ".au", ".snd", ".caf"),
    *(".w64", ".rf64", ".sph", ".nist", ".voc", ".ircam", ".sf", ".wve", ".avr", ".pvf", ".htk", ".mat"),
)
# libsndfile's container and subtype for the endings that are written.
_WRITERS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "oga": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "aiff": ("AIFF", "PCM_16"),
    "aif": ("AIFF", "PCM_16"),
    "au": ("AU", "PCM_16"),
    "caf": ("CAF", "PCM_16"),
    "w64": ("W64", "PCM_16"),
    "rf64": ("RF64", "PCM_16"),
}
_BLOCK_FRAMES = 1 << 20
MAX_RATE_HZ = 1_000_000


@dataclass(frozen=True)
class Audio:
    """One recording as mono samples.

    Args:
        samples: float32 [T], full scale is 1.
        sample_rate_hz: samples per second, as the file says.
        channels: how many channels the file had; they are averaged.
    """

    samples: Samples
    sample_rate_hz: int
    channels: int


@dataclass(frozen=True)
class AudioInfo:
    """What an audio file's header says.

    Args:
        sample_rate_hz: samples per second.
        channels: number of channels.
        frames: samples per channel.
        format: container and encoding in libsndfile's words.
    """

    sample_rate_hz: int
    channels: int
    frames: int
    format: str


def resampled_length(samples: int, rate_in: int, rate_out: int) -> int:
    """Length of `samples` samples after resampling: round(samples * rate_out / rate_in), without float error.

    Args:
        samples: number of samples at `rate_in`, at least 0.
        rate_in: rate of the input in Hz, at least 1.
        rate_out: rate of the output in Hz, at least 1.
    Returns:
        The number of samples; a half goes to the even neighbour, as Python's `round` has it.
    """
    return round(Fraction(samples * rate_out, rate_in))


def read_audio(path: str | os.PathLike[str]) -> Audio:
    """Reads any file that libsndfile reads and averages its channels.

    Args:
        path: the file.
    Returns:
        The recording at the file's own rate.
    Raises:
        DualCodecError: no such file, not audio, no samples in it, or samples that are not finite.
    """
    import numpy as np

    blocks = []
    with _opened(path) as file:
        rate, channels = int(file.samplerate), int(file.channels)
        # In blocks: a header may promise far more frames than the file holds, and only the mono signal is kept.
        while True:
            block = _read_block(file, path)
            if not len(block):
                break
            blocks.append(block[:, 0] if channels == 1 else block.mean(axis=1, dtype=np.float32))
    samples = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    if not samples.size:
        raise DualCodecError(f"{_name(path)}: holds no audio samples")
    if not np.isfinite(samples).all():
        first = int(np.flatnonzero(~np.isfinite(samples))[0])
        raise DualCodecError(f"{_name(path)}: sample {first} is not a finite number")
    return Audio(np.ascontiguousarray(samples), rate, channels)


def audio_info(path: str | os.PathLike[str]) -> AudioInfo:
    """Reads the header of an audio file.

    Args:
        path: the file.
    Returns:
        Rate, channels, length and format.
    Raises:
        DualCodecError: no such file, or not audio.
    """
    with _opened(path) as file:
        kind = f"{file.format_info}, {file.subtype_info}"
        return AudioInfo(int(file.samplerate), int(file.channels), int(file.frames), kind)


def resample(samples: Samples, rate_in: int, rate_out: int) -> Samples:
    """Resamples with soxr to an exact length.

    Args:
        samples: float32 [T] at `rate_in`.
        rate_in: rate of `samples` in Hz, 1 to 1,000,000.
        rate_out: rate wanted in Hz, 1 to 1,000,000.
    Returns:
        float32 [round(T * rate_out / rate_in)]; `samples` itself when the rates are equal.
    Raises:
        DualCodecError: a rate out of range.
    Numerics:
        soxr's high-quality band-limited filter (about 20 bits), with its delay taken off; what the rounding of the
        length leaves at the end is cut, or filled with zeros.
    """
    for name, rate in (("rate_in", rate_in), ("rate_out", rate_out)):
        if not 1 <= rate <= MAX_RATE_HZ:
            raise DualCodecError(f"resample: {name} must be 1 to {MAX_RATE_HZ} Hz, got {rate}")
    if rate_in == rate_out:
        return samples
    import soxr

    return fit_length(soxr.resample(samples, rate_in, rate_out), resampled_length(len(samples), rate_in, rate_out))


def fit_length(samples: Samples, length: int) -> Samples:
    """Cuts samples, or fills them up with zeros, at the end.

    Args:
        samples: float32 [T].
        length: samples wanted.
    Returns:
        float32 [length].
    """
    import numpy as np

    return samples[:length] if len(samples) >= length else np.pad(samples, (0, length - len(samples)))


def audio_format(name: str) -> str:
    """Checks that audio of this kind can be written.

    Args:
        name: a file's path, or the bare name of a format such as `flac`.
    Returns:
        The lower-case format name, a key for `encode_audio`.
    Raises:
        DualCodecError: the ending is none that is written; the text names those that are.
    """
    suffix = Path(name).suffix or (f".{name}" if "/" not in name else "")
    key = suffix.lower().removeprefix(".")
    if key not in _WRITERS:
        known = ", ".join(_WRITERS)
        raise DualCodecError(f"{name}: audio is written as one of {known}, got {key or 'a name without an ending'}")
    return key


def encode_audio(samples: Samples, sample_rate_hz: int, kind: str, comment: str | None = None) -> bytes:
    """Makes the bytes of an audio file.

    Args:
        samples: float32 [T]; what lies outside -1 to 1 is clipped by 16-bit formats.
        sample_rate_hz: samples per second.
        kind: `wav`, `flac`, `ogg`, ...: see `audio_format`.
        comment: text for the file's comment field, where the format has one.
    Returns:
        The file's contents.
    Raises:
        DualCodecError: the format can't hold this rate, or the samples are not finite.
    """
    import numpy as np
    import soundfile

    if not np.isfinite(samples).all():
        raise DualCodecError("the audio to write holds samples that are not finite numbers")
    container, subtype = _WRITERS[audio_format(kind)]
    # In memory first: libsndfile reports a full disk as a short write or not at all, write_atomic does so in words.
    sink = io.BytesIO()
    try:
        with soundfile.SoundFile(
            sink, "w", samplerate=sample_rate_hz, channels=1, format=container, subtype=subtype
        ) as file:
            if comment is not None:
                _set_comment(file, comment)
            # libsndfile's Vorbis encoder keeps whole blocks on the stack: long ones overflow it.
            for start in range(0, len(samples), _BLOCK_FRAMES // 16):
                file.write(samples[start : start + _BLOCK_FRAMES // 16])
    except (soundfile.SoundFileError, ValueError, TypeError) as error:
        # libsndfile's text names the stream in memory, which means nothing to a user.
        text = getattr(error, "error_string", None) or str(error)
        raise DualCodecError(f"cannot write {kind} at {sample_rate_hz} Hz: {reason(ValueError(text))}") from error
    return sink.getvalue()


def write_audio(
    path: str | os.PathLike[str],
    samples: Samples,
    sample_rate_hz: int,
    kind: str | None = None,
    comment: str | None = None,
) -> None:
    """Writes an audio file, whole or not at all.

    Args:
        path: the file; its ending gives the format unless `kind` does.
        samples: float32 [T].
        sample_rate_hz: samples per second.
        kind: format name, see `audio_format`.
        comment: text for the file's comment field, where the format has one.
    Raises:
        DualCodecError: the format is unknown, or the file can't be written.
    """
    data = encode_audio(samples, sample_rate_hz, kind or audio_format(os.fspath(path)), comment)
    write_atomic(path, data)


def _set_comment(file: Any, comment: str) -> None:
    import soundfile

    with contextlib.suppress(soundfile.SoundFileError):  # some containers have no text fields
        file.comment = comment


def _opened(path: str | os.PathLike[str]) -> Any:
    import soundfile

    source: Any = os.fspath(path)
    try:
        # Opened by Python as well, because libsndfile answers "System error" whatever the system said.
        with open(path, "rb") as probe:
            if not os.path.isfile(path):
                source = io.BytesIO(probe.read())  # a pipe can be read once, and not back and forth
                empty = not source.getbuffer().nbytes
            else:
                empty = not probe.read(1)
    except OSError as error:
        raise DualCodecError(f"cannot read {_name(path)}: {reason(error)}") from error
    if empty:
        raise DualCodecError(f"{_name(path)}: is an empty file")
    try:
        return soundfile.SoundFile(source)
    except (soundfile.SoundFileError, TypeError, ValueError) as error:
        text = getattr(error, "error_string", None) or str(error)
        raise DualCodecError(
            f"{_name(path)}: is not audio that libsndfile reads ({reason(ValueError(text))})"
        ) from error


def _read_block(file: Any, path: str | os.PathLike[str]) -> Any:
    import soundfile

    try:
        return file.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        text = getattr(error, "error_string", None) or str(error)
        raise DualCodecError(f"{_name(path)}: breaks off or is damaged ({reason(ValueError(text))})") from error


def _name(path: str | os.PathLike[str]) -> str:
    return os.fspath(path)
