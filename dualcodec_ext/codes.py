"""The code file: the codes of one recording and what is needed to decode them, as safetensors."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dualcodec_ext._files import AtomicFile, reason
from dualcodec_ext.audio import resampled_length
from dualcodec_ext.config import DualCodecConfig
from dualcodec_ext.errors import DualCodecError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Codes = npt.NDArray[np.uint16]

SUFFIX = ".codes.safetensors"
FORMAT_VERSION = 1
UNTRAINED = "untrained: not intelligible"
_KEY = "dualcodec_ext"
_LONGEST_HEADER = 100_000_000  # bytes, safetensors' own limit
_STRETCH = 1 << 16  # frames that are looked at or written at a time


@dataclass(frozen=True)
class CodeFile:
    """The codes of one recording, with what is needed to turn them back into audio of the same length.

    Args:
        semantic: uint16 [1, F], each below `config.semantic_codebook_size`.
        acoustic: uint16 [Q, F], each below `config.codebook_size`, Q up to `config.n_codebooks`; None without any.
        model: name of the model, such as `12hz_v1`.
        config: the model's settings.
        weights: which weights made the codes: `sha256:` and the digest of the weights file, or `seeded:` and the seed.
        source_samples: samples per channel of the recording.
        source_rate_hz: sample rate of the recording.
        repeated_frames: how many times the last semantic frame was repeated because the features came short.
        features: what the semantic features were, such as `w2v` or `log-mel`.
        version: of the file format.
    """

    semantic: Codes
    acoustic: Codes | None
    model: str
    config: DualCodecConfig
    weights: str
    source_samples: int
    source_rate_hz: int
    repeated_frames: int = 0
    features: str = "w2v"
    version: int = field(default=FORMAT_VERSION)

    @property
    def untrained(self) -> bool:
        """Whether the weights were random numbers, so that nothing intelligible comes back."""
        return is_seeded(self.weights)

    @property
    def frames(self) -> int:
        """Number of frames F."""
        return int(self.semantic.shape[1])

    @property
    def codebooks(self) -> int:
        """Number of codes per frame, the semantic one among them."""
        return 1 + (0 if self.acoustic is None else int(self.acoustic.shape[0]))

    @property
    def duration_s(self) -> float:
        """Length of the recording in seconds."""
        return self.source_samples / self.source_rate_hz

    @property
    def model_samples(self) -> int:
        """Length of the recording in samples at the model's rate."""
        return resampled_length(self.source_samples, self.source_rate_hz, self.config.sample_rate)

    @property
    def bitrate_bps(self) -> float:
        """Bits per second that the codes carry: frames per second times log2 of each codebook's size."""
        acoustic_bits = (self.codebooks - 1) * math.log2(self.config.codebook_size)
        return self.config.frame_rate_hz * (math.log2(self.config.semantic_codebook_size) + acoustic_bits)

    def first(self, quantizers: int | None) -> CodeFile:
        """The same codes with fewer codebooks.

        Args:
            quantizers: codes per frame to keep, the semantic one among them; 1 to `codebooks`. None keeps all.
        Returns:
            A code file whose acoustic codes are the first `quantizers - 1` rows.
        Raises:
            DualCodecError: out of range.
        """
        if quantizers is None or quantizers == self.codebooks:
            return self
        if not 1 <= quantizers <= self.codebooks:
            raise DualCodecError(f"quantizers must be 1 to {self.codebooks}, the codebooks here, got {quantizers}")
        kept = None if quantizers == 1 or self.acoustic is None else self.acoustic[: quantizers - 1]
        return replace(self, acoustic=kept)

    def span(self, first: int, last: int) -> tuple[Codes, Codes | None]:
        """Some of the frames, checked: of a file that `map_codes` gave nothing else is read.

        Args:
            first, last: frames first to last - 1, 0 <= first < last <= frames.
        Returns:
            uint16 [1, last - first], and [Q, last - first] or None.
        Raises:
            DualCodecError: a code out of its codebook's range.
        """
        import numpy as np

        parts = [None if c is None else np.array(c[:, first:last]) for c in (self.semantic, self.acoustic)]
        semantic, acoustic = parts
        assert semantic is not None
        problem = _range_problem(replace(self, semantic=semantic, acoustic=acoustic), first)
        if problem:
            raise DualCodecError(f"code file: {problem}")
        return semantic, acoustic

    def let_go(self) -> None:
        """Lets the system take back the memory of what was read of mapped codes; read again, it comes from the file."""
        import mmap

        for values in (self.semantic, self.acoustic):
            mapped = getattr(values, "_mmap", None)
            if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def to_bytes(self) -> bytes:
        """The contents of the file.

        Returns:
            A safetensors file with the tensors `semantic` and `acoustic` and one JSON text in its metadata.
        Raises:
            DualCodecError: the codes and the settings don't belong together.
        """
        return b"".join(self._parts())

    def _parts(self) -> Iterator[bytes]:
        """The contents of the file, codebook by codebook and stretch by stretch."""
        import numpy as np

        problem = _problem(self)
        if problem:
            raise DualCodecError(f"code file: {problem}")
        tensors = {"semantic": self.semantic} if self.acoustic is None else {}
        if self.acoustic is not None:
            tensors = {"acoustic": self.acoustic, "semantic": self.semantic}  # safetensors' own order
        header: dict[str, Any] = {"__metadata__": {_KEY: json.dumps(self.metadata(), sort_keys=True)}}
        at = 0
        for name, values in tensors.items():
            size = 2 * int(values.size)
            header[name] = {"dtype": "U16", "shape": list(values.shape), "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        yield len(text).to_bytes(8, "little") + text
        for values in tensors.values():
            for row in values:
                for at in range(0, self.frames, _STRETCH):
                    yield np.ascontiguousarray(row[at : at + _STRETCH], "<u2").tobytes()
                    self.let_go()

    def metadata(self) -> dict[str, Any]:
        """What the file says about its codes.

        Returns:
            A mapping that JSON can hold.
        """
        facts: dict[str, Any] = {
            "format_version": self.version,
            "model": self.model,
            "config": self.config.to_dict(),
            "weights": self.weights,
            "untrained": self.untrained,
            "features": self.features,
            "sample_rate_hz": self.config.sample_rate,
            "frames": self.frames,
            "codebooks": self.codebooks,
            "source_samples": self.source_samples,
            "source_rate_hz": self.source_rate_hz,
            "last_semantic_frame_repeated": self.repeated_frames,
        }
        if self.untrained:
            facts["note"] = UNTRAINED
        return facts


def is_seeded(weights: str) -> bool:
    """Tells random weights from a file's.

    Args:
        weights: a code file's `weights`.
    Returns:
        True for `seeded:` and a number.
    """
    return weights.startswith("seeded:")


def write_codes(path: str | os.PathLike[str], codes: CodeFile) -> None:
    """Writes a code file, whole or not at all.

    Args:
        path: the file, by custom ending in `.codes.safetensors`.
        codes: what goes in.
    Raises:
        DualCodecError: the codes and the settings don't belong together, or the file can't be written.
    """
    parts = codes._parts()
    first = next(parts)  # which checks them
    with AtomicFile(path) as file:
        file.write(first)
        for part in parts:
            file.write(part)


def is_code_file(path: str | os.PathLike[str]) -> bool:
    """Tells a code file from other files by its header.

    Args:
        path: any file.
    Returns:
        True when it is safetensors and carries this package's metadata. A damaged file gives False.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="numpy") as file:
            return _KEY in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def read_codes(path: str | os.PathLike[str]) -> CodeFile:
    """Reads a code file and checks everything in it.

    Args:
        path: the file.
    Returns:
        The codes and their settings.
    Raises:
        DualCodecError: missing, empty, cut short, no safetensors, no code file, from a newer version, settings that no
            model has, codes out of their codebook's range, or a length that doesn't fit the number of frames.
    """
    return _read(path, _whole)


def map_codes(path: str | os.PathLike[str], check: bool = False) -> CodeFile:
    """As `read_codes`, but the codes stay in the file until `CodeFile.span` or someone else reads some of them.

    Args:
        path: the file, which must stay as it is as long as the result is in use.
        check: look at all codes now, some at a time; else `CodeFile.span` looks at what it reads.
    Returns:
        The codes, mapped from the file, and their settings.
    Raises:
        DualCodecError: as `read_codes`, but without `check` not for codes out of range.
    """
    return _read(path, _mapped, check)


def _read(path: str | os.PathLike[str], load: Callable[[Any], dict[str, Any]], check: bool = True) -> CodeFile:
    from safetensors import SafetensorError

    name = os.fspath(path)
    try:
        with open(path, "rb") as source:
            begin = source.read(8)
            if not begin:
                raise DualCodecError("is an empty file")
            begin += source.read(min(int.from_bytes(begin, "little"), _LONGEST_HEADER))
            try:
                facts = _header_facts(begin, source)
                codes = _from_facts(facts, load(source))
            except SafetensorError as error:
                raise DualCodecError(_safetensors_problem(begin, source, error)) from error
        problem = _shape_problem(codes) or (_range_problem(codes) if check else None)
        problem = problem or _disagreement(codes, facts)
        if problem:
            raise DualCodecError(problem)
    except OSError as error:
        raise DualCodecError(f"cannot read {name}: {reason(error)}") from error
    except DualCodecError as error:
        raise DualCodecError(f"{name}: {error}") from error
    return codes


def _whole(source: Any) -> dict[str, Any]:
    from safetensors.numpy import load

    source.seek(0)
    return load(source.read())


def _mapped(source: Any) -> dict[str, Any]:
    import numpy as np
    from safetensors import safe_open

    with safe_open(source.name, framework="numpy"):  # raises what is wrong with the file as a whole, if anything is
        pass
    source.seek(0)
    size = int.from_bytes(source.read(8), "little")
    found = {}
    for name, entry in _header(source.read(size), 0).items():
        if name in ("semantic", "acoustic"):
            offset, shape = 8 + size + entry["data_offsets"][0], tuple(entry["shape"])
            if entry["dtype"] != "U16" or 0 in shape:  # refused anyway
                found[name] = _whole(source)[name]
            else:
                found[name] = np.memmap(source, "<u2", "c", offset, shape)  # torch takes no memory that is read-only
    return found


def _header(data: bytes, begin: int = 8) -> dict[str, Any]:
    """The JSON header that a safetensors file opens with, or {} where there is none."""
    try:
        header = json.loads(data[begin:])
    except ValueError:
        return {}
    return header if isinstance(header, dict) else {}


def _header_facts(begin: bytes, source: Any) -> Any:
    text = (_header(begin).get("__metadata__") or {}).get(_KEY)
    if text is None:
        _whole(source)  # raises what is wrong with the file as a whole, if anything is
        raise DualCodecError("is safetensors, but no code file of dualcodec_ext")
    try:
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise DualCodecError("its metadata is no JSON") from error


def _safetensors_problem(begin: bytes, source: Any, error: Exception) -> str:
    size, length = int.from_bytes(begin[:8], "little"), os.fstat(source.fileno()).st_size
    if length > 8 and begin[8:9] == b"{" and (8 + size > length or _header(begin)):
        return f"is cut short or damaged ({error})"
    return "is not a safetensors file"


def _from_facts(facts: Any, tensors: dict[str, Any]) -> CodeFile:
    if not isinstance(facts, dict):
        raise DualCodecError(f"its metadata must be a mapping, got {type(facts).__name__}")
    version = _fact(facts, "format_version", int)
    if version != FORMAT_VERSION:
        age = "a newer" if version > FORMAT_VERSION else "an unknown"
        raise DualCodecError(f"was written in {age} format (version {version}; this program reads {FORMAT_VERSION})")
    settings = _fact(facts, "config", dict)
    try:
        config = DualCodecConfig.from_dict(settings)
    except (TypeError, ValueError) as error:
        raise DualCodecError(f"its model settings are wrong: {error}") from error
    if "semantic" not in tensors:
        raise DualCodecError("has no semantic codes")
    return CodeFile(
        semantic=tensors["semantic"],
        acoustic=tensors.get("acoustic"),
        model=_fact(facts, "model", str),
        config=config,
        weights=_fact(facts, "weights", str),
        source_samples=_fact(facts, "source_samples", int),
        source_rate_hz=_fact(facts, "source_rate_hz", int),
        repeated_frames=_fact(facts, "last_semantic_frame_repeated", int),
        features=_fact(facts, "features", str),
        version=version,
    )


def _fact(facts: dict[str, Any], name: str, kind: type) -> Any:
    if name not in facts:
        raise DualCodecError(f"its metadata lacks {name}")
    value = facts[name]
    # bool is an int to isinstance, but not to a reader of the file.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise DualCodecError(f"{name} in its metadata must be {kind.__name__}, got {value!r}")
    return value


def _disagreement(codes: CodeFile, facts: dict[str, Any]) -> str | None:
    """A number that the metadata and the tensors give differently, in one line; None when there is none."""
    for name in ("sample_rate_hz", "frames", "codebooks", "untrained"):
        meant = codes.metadata()[name]
        if facts.get(name) != meant:
            return f"{name} in its metadata must be {meant}, got {facts.get(name)!r}"
    return None


def _problem(codes: CodeFile) -> str | None:
    """What is wrong with the codes, in one line; None when nothing is."""
    return _shape_problem(codes) or _range_problem(codes)


def _tensors(codes: CodeFile) -> list[tuple[str, Codes, int, int]]:
    """Name, values, entries and most codebooks of each kind."""
    config = codes.config
    tensors = [("semantic", codes.semantic, config.semantic_codebook_size, 1)]
    if codes.acoustic is not None:
        tensors.append(("acoustic", codes.acoustic, config.codebook_size, config.n_codebooks))
    return tensors


def _range_problem(codes: CodeFile, first: int = 0) -> str | None:
    """As `_problem`, of the codes themselves; first: the frame that they begin with."""
    for name, values, size, _ in _tensors(codes):
        for at in range(0, values.shape[1], _STRETCH):
            part = values[:, at : at + _STRETCH]
            worst = int(part.max())
            if worst >= size:
                row, frame = (int(i) for i in divmod(int(part.argmax()), part.shape[1]))
                return f"{name} code {worst} at codebook {row}, frame {first + at + frame} is not below {size}"
            codes.let_go()
    return None


def _shape_problem(codes: CodeFile) -> str | None:
    """As `_problem`, of everything but the codes themselves."""
    for name, values, _, most in _tensors(codes):
        if values.dtype.name != "uint16":
            return f"{name} codes must be uint16, got {values.dtype.name}"
        shape = list(values.shape)
        rows = "1" if name == "semantic" else f"1 to {most}"
        if len(shape) != 2 or not 1 <= shape[0] <= most:
            return f"{name} codes must be [{rows}, F], got {shape}"
        if shape[1] != codes.frames or codes.frames == 0:
            return f"{name} codes must have {codes.frames or 'at least 1'} frames, got {shape[1]}"
    if not 0 <= codes.repeated_frames <= codes.frames:
        return f"repeated frames must be 0 to {codes.frames}, got {codes.repeated_frames}"
    if codes.source_samples < 1 or codes.source_rate_hz < 1:
        return f"the recording must have samples and a rate, got {codes.source_samples} at {codes.source_rate_hz} Hz"
    needed = -(-codes.model_samples // codes.config.hop_length)
    # Codes made elsewhere may lack the frames that the features came short by: DualCodec allows two.
    if not needed - 2 <= codes.frames <= max(needed, 1):
        return f"{codes.model_samples} samples need {needed} frames, got {codes.frames}"
    return None
