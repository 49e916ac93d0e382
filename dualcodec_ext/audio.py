"""Audio files: any format, rate and channel count in; mono samples at the model's rate out, and back."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualcodec_ext._files import AtomicFile, reason
from dualcodec_ext._signals import signals_later
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
# Written at once: lossy encoders' results depend on it, and libsndfile's Vorbis encoder keeps whole blocks on the
# stack, which long ones overflow.
_WRITTEN_SAMPLES = 1 << 16
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
    with AudioReader(path) as file:
        return Audio(file.whole(), file.sample_rate_hz, file.channels)


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
    _check_rates(rate_in, rate_out)
    if rate_in == rate_out:
        return samples
    import soxr

    return fit_length(soxr.resample(samples, rate_in, rate_out), resampled_length(len(samples), rate_in, rate_out))


def _check_rates(rate_in: int, rate_out: int) -> None:
    for name, rate in (("rate_in", rate_in), ("rate_out", rate_out)):
        if not 1 <= rate <= MAX_RATE_HZ:
            raise DualCodecError(f"resample: {name} must be 1 to {MAX_RATE_HZ} Hz, got {rate}")


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
        The lower-case format name.
    Raises:
        DualCodecError: the ending is none that is written; the text names those that are.
    """
    suffix = Path(name).suffix or (f".{name}" if "/" not in name else "")
    key = suffix.lower().removeprefix(".")
    if key not in _WRITERS:
        known = ", ".join(_WRITERS)
        raise DualCodecError(f"{name}: audio is written as one of {known}, got {key or 'a name without an ending'}")
    return key


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
    with AudioWriter(path, sample_rate_hz, kind, comment) as file:
        file.write(samples)


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
        with signals_later():
            return soundfile.SoundFile(source)
    except (soundfile.SoundFileError, TypeError, ValueError) as error:
        raise DualCodecError(f"{_name(path)}: is not audio that libsndfile reads ({reason(error)})") from error


class AudioReader:
    """An audio file that is read block by block, its channels averaged.

    A context manager. A header may promise more frames than the file holds: `promised_samples` is no more than that.

    Args:
        path: any file that libsndfile reads.
    Raises:
        DualCodecError: no such file, not audio, no samples in it, or samples that are not finite.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        self._file = _opened(path)
        # soundfile seeks to where it is after every read; in MP3 that makes a seam of some hundred wrong samples.
        self._file.seekable = lambda: False
        self.sample_rate_hz, self.channels = int(self._file.samplerate), int(self._file.channels)
        self.promised_samples = int(self._file.frames)
        self.samples = 0  # read so far

    def __enter__(self) -> AudioReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    @property
    def promised_s(self) -> float:
        """The seconds that the header promises."""
        return self.promised_samples / self.sample_rate_hz

    def whole(self) -> Samples:
        """Reads everything that has not been read."""
        import numpy as np

        return np.concatenate(list(self.blocks(_BLOCK_FRAMES)))

    def blocks(self, samples: int) -> Iterator[Samples]:
        """Yields float32 [n], n up to `samples`, until the file ends."""
        import numpy as np

        while len(block := self._read(samples)):
            mono = block[:, 0] if self.channels == 1 else block.mean(axis=1, dtype=np.float32)
            if not np.isfinite(mono).all():
                first = self.samples + int(np.flatnonzero(~np.isfinite(mono))[0])
                raise DualCodecError(f"{_name(self._path)}: sample {first} is not a finite number")
            self.samples += len(mono)
            yield mono
        if not self.samples:
            raise DualCodecError(f"{_name(self._path)}: holds no audio samples")

    def _read(self, samples: int) -> Any:
        import soundfile

        try:
            with signals_later():
                return self._file.read(samples, dtype="float32", always_2d=True)
        except soundfile.SoundFileError as error:
            raise DualCodecError(f"{_name(self._path)}: breaks off or is damaged ({reason(error)})") from error


class AudioWriter:
    """An audio file that is written as its samples come, whole or not at all.

    A context manager, as `AtomicFile`.

    Args:
        path: the file; its ending gives the format unless `kind` does.
        sample_rate_hz: samples per second.
        kind: format name, see `audio_format`.
        comment: text for the file's comment field, where the format has one.
    Raises:
        DualCodecError: the format is unknown or can't hold this rate, the samples are not finite, or the file can't be
            written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        sample_rate_hz: int,
        kind: str | None = None,
        comment: str | None = None,
    ) -> None:
        self._kind = audio_format(kind or os.fspath(path))
        self._rate_hz, self._comment = sample_rate_hz, comment
        self._atomic = AtomicFile(path)
        self._sink = _Sink(self._atomic)
        self._file: Any = None

    def __enter__(self) -> AudioWriter:
        import numpy as np
        import soundfile

        self._held = np.zeros(0, np.float32)
        self._atomic.__enter__()
        try:
            container, subtype = _WRITERS[self._kind]
            with self._explained():
                self._file = soundfile.SoundFile(
                    self._sink, "w", samplerate=self._rate_hz, channels=1, format=container, subtype=subtype
                )
            if self._comment is not None:
                with signals_later(), contextlib.suppress(soundfile.SoundFileError):  # some have no text fields
                    self._file.comment = self._comment
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def write(self, samples: Samples) -> None:
        """Writes float32 [T]; 16-bit formats hold the nearest step, and clip what lies outside -1 to 1."""
        import numpy as np

        if not np.isfinite(samples).all():
            raise DualCodecError("the audio to write holds samples that are not finite numbers")
        self._held = np.concatenate([self._held, samples])
        while len(self._held) >= _WRITTEN_SAMPLES:
            self._write_held()

    def _write_held(self) -> None:
        block, self._held = self._held[:_WRITTEN_SAMPLES], self._held[_WRITTEN_SAMPLES:]
        if self._file.subtype == "PCM_16":  # to the nearest step; libsndfile takes the one below
            block = (block * 32768).round().clip(-32768, 32767).astype("int16")
        with self._explained():
            self._file.write(block)

    def __exit__(self, *error: Any) -> None:
        stack = contextlib.ExitStack()
        stack.push(self._atomic.__exit__)  # it sees what goes wrong in the other one
        stack.push(self._close)
        stack.__exit__(*error)

    def _close(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None and len(self._held):
                self._write_held()
        finally:
            with self._explained():
                if self._file is not None:
                    self._file.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        import soundfile

        try:
            with signals_later():
                yield
        except (soundfile.SoundFileError, ValueError, TypeError, AssertionError) as error:  # the last: a short write
            self._sink.check()
            raise DualCodecError(f"cannot write {self._kind} at {self._rate_hz} Hz: {reason(error)}") from error
        self._sink.check()


class _Sink:
    """What libsndfile writes to. It loses what a callback raises, so that is kept here until `check`."""

    def __init__(self, file: AtomicFile) -> None:
        self._file = file
        self._failure: BaseException | None = None
        self.seek, self.tell, self.read = file.seek, file.tell, file.read

    def write(self, data: bytes) -> int:
        if self._failure is not None:
            return 0
        try:
            return self._file.write(data)
        except BaseException as failure:
            self._failure = failure
            return 0

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure


class Resampler:
    """`resample`, of samples that come in pieces: joined, the results have the same bits.

    Args:
        rate_in: rate of what is written, in Hz, 1 to 1,000,000.
        rate_out: rate wanted in Hz, 1 to 1,000,000.
    Raises:
        DualCodecError: a rate out of range.
    """

    def __init__(self, rate_in: int, rate_out: int) -> None:
        _check_rates(rate_in, rate_out)
        self._rates = rate_in, rate_out
        self._stream: Any = None
        if rate_in != rate_out:
            import soxr

            self._stream = soxr.ResampleStream(rate_in, rate_out, 1, dtype="float32")
        self._read = self._given = 0

    def write(self, samples: Samples) -> Samples:
        """Takes float32 [T] in, and returns float32 of what can be known by now."""
        self._read += len(samples)
        given = samples if self._stream is None else self._stream.resample_chunk(samples)
        self._given += len(given)
        return given

    def finish(self) -> Samples:
        """Returns the rest."""
        import numpy as np

        rest = np.zeros(0, np.float32)
        if self._stream is not None:
            rest = self._stream.resample_chunk(rest, last=True)
        return fit_length(rest, max(0, resampled_length(self._read, *self._rates) - self._given))


def _name(path: str | os.PathLike[str]) -> str:
    return os.fspath(path)
