"""Audio in pieces for `stream`: raw PCM on pipes and in files, and what libsndfile reads and writes."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from dualcodec_ext._files import AtomicFile, reason
from dualcodec_ext.audio import AudioReader, AudioWriter, Resampler
from dualcodec_ext.errors import DualCodecError

if TYPE_CHECKING:
    from dualcodec_ext.audio import Samples

# Name endings of files that hold samples and nothing else.
RAW_SUFFIXES = (".raw", ".pcm", ".s16", ".s16le", ".f32", ".f32le")
_TYPES = {"s16le": "<i2", "f32le": "<f4"}


class Source(Protocol):
    """Where audio comes from; `note` is something to say at the end."""

    note: str

    def pieces(self, samples: int) -> Iterator[Samples]:
        """Yields float32 [n] at the model's rate, n up to about `samples`, as they come."""
        ...


class Sink(Protocol):
    """Where audio goes."""

    def write(self, samples: Samples) -> None:
        """Takes float32 [n]."""
        ...


class RawSource:
    """Raw PCM from a file descriptor.

    Args:
        handle: what is read from.
        name: of the file, for messages.
        sample_format: s16le or f32le.
    """

    def __init__(self, handle: int, name: str, sample_format: str) -> None:
        self._handle, self._name, self._type = handle, name, np.dtype(_TYPES[sample_format])
        self.note = ""
        self.live = not stat.S_ISREG(os.fstat(handle).st_mode)  # a pipe or a device: its end is not known before
        self.wait: Callable[[int], bool] = lambda handle: (
            True
        )  # whether there is more; replaced where Ctrl-C is the end

    def pieces(self, samples: int) -> Iterator[Samples]:
        size, rest, count = self._type.itemsize, b"", 0
        while data := self._read(samples * size - len(rest)):
            data = rest + data
            whole = len(data) - len(data) % size
            rest = data[whole:]
            if whole:
                piece = self._samples(data[:whole], count)
                count += len(piece)
                yield piece
        if rest:
            self.note = f"{self._name} ended within a sample: its last {len(rest)} byte(s) were left out"
        if not count:
            raise DualCodecError(f"{self._name}: holds no audio samples")

    def _read(self, count: int) -> bytes:
        try:
            if not self.wait(self._handle):
                return b""
            return os.read(self._handle, count)  # what is there, without waiting for the rest
        except OSError as error:
            raise DualCodecError(f"cannot read {self._name}: {reason(error)}") from error

    def _samples(self, data: bytes, before: int) -> Samples:
        values = np.frombuffer(data, self._type).astype(np.float32)
        if self._type.kind == "i":
            return values / np.float32(32768)
        if not np.isfinite(values).all():
            first = before + int(np.flatnonzero(~np.isfinite(values))[0])
            raise DualCodecError(f"{self._name}: sample {first} is not a finite number")
        return values


class FileSource:
    """Any audio file, its channels averaged and resampled.

    Args:
        reader: the file.
        rate_hz: the model's.
    """

    note = ""

    def __init__(self, reader: AudioReader, rate_hz: int) -> None:
        self._reader, self._rate_hz = reader, rate_hz

    def pieces(self, samples: int) -> Iterator[Samples]:
        resampler = Resampler(self._reader.sample_rate_hz, self._rate_hz)
        held = np.zeros(0, np.float32)
        # The resampler gives stretches of its own lengths.
        for block in self._reader.blocks(1 << 16):
            held = np.concatenate([held, resampler.write(block)])
            while len(held) >= samples:
                yield held[:samples]
                held = held[samples:]
        held = np.concatenate([held, resampler.finish()])
        for at in range(0, len(held), samples):
            yield held[at : at + samples]


class _RawSink:
    def __init__(self, write: Callable[[bytes], object], sample_format: str) -> None:
        self._write, self._type = write, _TYPES[sample_format]

    def write(self, samples: Samples) -> None:
        if self._type == "<i2":
            samples = np.clip(np.rint(samples * 32768), -32768, 32767)
        self._write(samples.astype(self._type).tobytes())


@contextlib.contextmanager
def open_source(name: str, sample_format: str, rate_hz: int) -> Iterator[Source]:
    """Opens what audio is read from.

    Args:
        name: a file, or - for stdin.
        sample_format: of raw PCM: s16le or f32le.
        rate_hz: the model's rate.
    Raises:
        DualCodecError: it can't be read.
    """
    if name == "-":
        handle = _descriptor(sys.stdin, "stdin")
        if os.isatty(handle):
            raise DualCodecError("--in -: stdin is a terminal, and raw PCM is needed")
        yield RawSource(handle, "stdin", sample_format)
    elif Path(name).suffix.lower() in RAW_SUFFIXES:
        with _open(name, "rb") as file:
            yield RawSource(file.fileno(), name, sample_format)
    else:
        with AudioReader(name) as reader:
            yield FileSource(reader, rate_hz)


@contextlib.contextmanager
def open_sink(name: str, sample_format: str, rate_hz: int) -> Iterator[Sink]:
    """Opens what audio is written to: a file whole or not at all, pipes and devices as it comes.

    Args:
        name: a file, or - for stdout.
        sample_format: of raw PCM: s16le or f32le.
        rate_hz: the model's rate.
    Raises:
        DualCodecError: it can't be written.
    """
    if name == "-":
        handle = _descriptor(sys.stdout, "stdout")
        if os.isatty(handle):
            raise DualCodecError("--out -: stdout is a terminal, and raw PCM would go to it")
        yield _RawSink(lambda data: _write_all(handle, data), sample_format)
    elif os.path.exists(name) and not os.path.isfile(name) and not os.path.isdir(name):
        with _open(name, "wb") as device:
            yield _RawSink(lambda data: _write_all(device.fileno(), data), sample_format)
    elif Path(name).suffix.lower() in RAW_SUFFIXES:
        with AtomicFile(name) as file:
            yield _RawSink(file.write, sample_format)
    else:
        with AudioWriter(name, rate_hz) as writer:
            yield writer


def _open(name: str, mode: Literal["rb", "wb"]) -> FileIO:
    try:
        return open(name, mode, buffering=0)
    except OSError as error:
        raise DualCodecError(f"cannot {'read' if mode == 'rb' else 'write'} {name}: {reason(error)}") from error


def _descriptor(stream: Any, name: str) -> int:
    try:
        found: int = stream.fileno()
    except (AttributeError, OSError, ValueError):
        raise DualCodecError(f"{name} is closed") from None
    return found


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]
