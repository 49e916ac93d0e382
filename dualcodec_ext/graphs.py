"""CUDA graphs: whole decodes and encodes, recorded once per (batch, frames) bucket and replayed.

A short call is bound by starting its forty-odd kernels one by one; a graph starts them at once. Frames are rounded up
to a bucket, and lengths keep what lies behind a clip's end from mattering, so that a replay gives the bits of the
eager engine. Kernels that look at lengths wait for those in front of them first, so that calls whose clips all fill
their bucket have a recording of their own without lengths; so have those of one length that comes again and again.
Calls return before their results are there, as PyTorch's do; a decode waits for the look at its codes alone.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ._code_look import Again, CodeInput, CodeLook, again_of, shapes_of
from .engine import Engine
from .errors import DualCodecError
from .ops import _common
from .ops._choice import ENGINE

MAX_FRAMES = 2048  # of a bucket; a longer call is bound by its work, not by its launches
_IN_A_ROW = 3  # calls of one length, behind which it has a recording of its own
_CAP = "DUALCODEC_EXT_GRAPH_MIB"
_DEFAULT_CAP_MIB = 4096


def bucket_frames(frames: int) -> int | None:
    """Return the frames that a call of `frames` is rounded up to; None: it runs without a graph."""
    if frames <= 16:
        return frames or None
    if frames > MAX_FRAMES:
        return None
    unit = 8 if frames <= 256 else 64
    return -(-frames // unit) * unit


def memory_cap_bytes() -> int:
    """Return how much memory a model's graphs may hold: DUALCODEC_EXT_GRAPH_MIB, by default 4096; 0 turns them off."""
    text = os.environ.get(_CAP, "").strip() or str(_DEFAULT_CAP_MIB)
    if not text.isdecimal():
        raise DualCodecError(f"{_CAP} must be a number of MiB, got {text!r}")
    return int(text) * 2**20


Run = Callable[[], tuple[Tensor, ...]]


class Recorder(Protocol):
    """Turns a function on fixed tensors into one that can be repeated cheaply."""

    def record(self, run: Run) -> tuple[Callable[[], Any], tuple[Tensor, ...], int]:
        """Return (replay, the tensors that a replay fills, bytes that the recording holds)."""
        ...


class CudaRecorder:
    """Records with torch.cuda.CUDAGraph, each recording in memory of its own, so that it can be dropped alone."""

    def record(self, run: Run) -> tuple[Callable[[], Any], tuple[Tensor, ...], int]:
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            run()  # what a first call sets up may not happen inside a recording
        current.wait_stream(side)
        torch.cuda.synchronize()
        before = torch.cuda.memory_reserved()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()
        return graph.replay, outputs, max(0, torch.cuda.memory_reserved() - before)


def _own(tensor: Tensor, steps: int) -> Tensor:
    """Return a copy of the first steps, of which there may be as many as there are."""
    return (tensor if tensor.shape[-1] <= steps else tensor[..., :steps]).clone()


@dataclass
class _Recording:
    inputs: dict[str, Tensor]
    replay: Callable[[], Any]
    outputs: tuple[Tensor, ...]
    bytes: int
    codes: tuple[CodeInput, ...] = ()  # of a decode, among the inputs
    rows_of: Tensor | None = None  # of a decode `Engine.decode_lengths` of every length, on the CPU: slow to work out
    lengths: tuple[Any, ...] | None = None  # what inputs["lengths"] holds now
    free: Any = None  # the event behind the last use, on CUDA, of a recording that `again` does not start
    key: Any = None  # that it is found by
    again: Again | None = None  # of a decode without lengths: starts it for codes of its own shape

    @property
    def shape(self) -> Any:
        """Of the codes that `again` takes, semantic and acoustic."""
        return shapes_of(self.codes[0].to, self.codes[1].to if len(self.codes) > 1 else None)

    def wait(self) -> None:
        """Make the current stream wait for the last use, which may have been on another one."""
        if self.again is not None:
            self.again.wait()
        elif self.free is not None:
            self.free.wait()

    def release(self, on_cuda: bool) -> None:
        """End a use on the current stream."""
        if self.again is not None:
            self.again.release()
        elif on_cuda:
            if self.free is None:
                self.free = torch.cuda.Event()
            self.free.record()


@dataclass
class Graphs:
    """Runs an engine through recordings: the second call of a bucket records, later ones replay.

    Args:
        engine: what is recorded.
        recorder: how; None: CudaRecorder on CUDA, not at all elsewhere.
        cap_bytes: memory that all recordings may hold; the ones used longest ago are dropped for new ones.
    """

    engine: Engine
    recorder: Recorder | None = None
    cap_bytes: int = field(default_factory=memory_cap_bytes)

    def __post_init__(self) -> None:
        if self.recorder is None and self.engine.device.type == "cuda":
            self.recorder = CudaRecorder()
        self._recordings: OrderedDict[Any, _Recording] = OrderedDict()
        self._seen: set[Any] = set()
        self._too_large: set[Any] = set()
        self._rows: dict[str, tuple[Any, int]] = {}  # the last decode's and encode's own key, and how often in a row
        self._looks: list[CodeLook] = []  # that no call uses
        self._again: dict[Any, _Recording] = {}  # those that can be started again, by their codes' shapes
        self._lock = threading.Lock()

    def held_bytes(self) -> int:
        """Return the memory that the recordings hold."""
        return sum(recording.bytes for recording in self._recordings.values())

    @property
    def records(self) -> bool:
        """Whether calls are recorded at all."""
        return self.recorder is not None and self.cap_bytes > 0

    def chosen(self) -> bool:
        """Whether the engine, and not the reference, is to run now."""
        return _common.choose_backend(self.engine.device, self.engine.dtype, ENGINE) != "reference"

    def decode(self, semantic_codes: Tensor, acoustic_codes: Tensor | None, frame_lengths: Tensor | None) -> Tensor:
        """As `Engine.decode`, with the codes' own lengths [B] on the CPU or None."""
        audio = self._decode(semantic_codes, acoustic_codes, frame_lengths, None)
        # Of a code out of range the eager engine names the place, unless it lies where nobody looks.
        return self.engine.decode_clips(semantic_codes, acoustic_codes, frame_lengths) if audio is None else audio

    def replay_decode(
        self,
        semantic_codes: Tensor,
        acoustic_codes: Tensor | None,
        frame_lengths: Tensor | None,
        holds: Callable[[], bool],
    ) -> Tensor | None:
        """As `decode` where that would replay a recording, else None.

        Args:
            semantic_codes, acoustic_codes, frame_lengths: as for `decode`.
            holds: called while the GPU works; False drops what comes of it: None.

        Returns:
            The audio; None also for a code out of range.
        """
        return self._decode(semantic_codes, acoustic_codes, frame_lengths, holds)

    def decode_again(self, semantic: Tensor, acoustic: Tensor | None, holds: Callable[[], bool]) -> Tensor | None:
        """As `replay_decode` for codes, none of them shorter, of a shape and type that have a recording of their own:
        there is next to nothing to find out before the GPU begins.

        Args:
            semantic, acoustic: as they were given; other codes are left to `replay_decode`.
            holds: as for `replay_decode`.

        Returns:
            The audio; None also where there is no such recording.
        """
        shape = shapes_of(semantic, acoustic)
        if shape not in self._again or _common.asked_backend() == "reference":
            return None
        with self._lock:
            recording = self._again.get(shape)
            if recording is None or recording.again is None:
                return None
            if not self._looks:
                return None  # its memory is no recording's own, and can't be taken where a capture is under way
            look = self._looks.pop()
            started = True
            try:
                audio = recording.again.start(look, semantic, acoustic, None)
                started = audio is not None
            finally:
                if not started:
                    self._looks.append(look)  # of one that failed the kernel may still run
            if audio is None:
                return None
            self._rows.pop("decode", None)
            self._recordings.move_to_end(recording.key)
        try:
            held = self.chosen() and holds()
        finally:
            fine = look.fine()  # its kernel has ended, so that the next call may have the look
            self._looks.append(look)
        return audio if held and fine else None

    def _decode(
        self, semantic: Tensor, acoustic: Tensor | None, frame_lengths: Tensor | None, holds: Callable[[], bool] | None
    ) -> Tensor | None:
        batch, _, frames = semantic.shape
        stages = 0 if acoustic is None else acoustic.shape[1]
        own = [frames] * batch if frame_lengths is None else frame_lengths.tolist()
        with self._lock, self._on_device():
            key = self._key("decode", batch, frames, all(n == frames for n in own), stages)
            if holds is not None and key not in self._recordings:
                return None
            recording = self._find(key, lambda: self._record_decode(batch, key[2], key[3], stages))
            if recording is None:
                return None
            look = self._looks.pop() if self._looks else CodeLook(self.engine.device)
            look.take(recording.codes, [semantic] if acoustic is None else [semantic, acoustic])
            rows_of = recording.rows_of
            if rows_of is not None:
                self._fill_lengths(recording, (tuple(own),), lambda n: rows_of[:, n])
            recording.replay()
            audio = _own(recording.outputs[0], self.engine.decoded_samples(frames))
            recording.release(self.engine.device.type == "cuda")
        held = holds is None or holds()
        fine = look.fine()
        self._looks.append(look)
        return audio if held and fine else None

    def encode(
        self,
        audio: Tensor | None,
        semantic_repr: Tensor,
        num_quantizers: int | None,
        frame_lengths: Tensor | None,
        sample_lengths: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `Engine.encode`, with the inputs' own lengths [B] on the CPU or None."""
        batch, _, frames = semantic_repr.shape
        hop = self.engine.hop_samples
        longest = frames if audio is None else max(frames, audio.shape[-1] // hop)
        own = [frames] * batch if frame_lengths is None else frame_lengths.tolist()
        samples: list[int] | None = None
        if audio is not None:
            samples = [audio.shape[-1]] * batch if sample_lengths is None else sample_lengths.tolist()
        whole = all(n == longest for n in own) and all(n == longest * hop for n in samples or [])
        with self._lock, self._on_device():
            key = self._key("encode", batch, longest, whole, audio is not None, num_quantizers)
            recording = self._find(
                key,
                lambda: self._record_encode(batch, key[2], key[3], audio is not None, num_quantizers, semantic_repr),
            )
            if recording is not None:
                self._fill(recording, "features", semantic_repr)
                if audio is not None:
                    self._fill(recording, "audio", audio)
                if "lengths" in recording.inputs:
                    lengths = (tuple(own), None if samples is None else tuple(samples))
                    self._fill_lengths(recording, lengths, self.engine.encode_lengths)
                recording.replay()
                codes = [_own(c, frames) for c in recording.outputs]
                recording.release(self.engine.device.type == "cuda")
                return codes[0], codes[1] if len(codes) > 1 else None
        return self.engine.encode_clips(audio, semantic_repr, num_quantizers, frame_lengths, sample_lengths)

    def _key(self, kind: str, batch: int, frames: int, whole: bool, *rest: object) -> Any:
        """Return which recording a call takes: (kind, batch, its frames or None, whether without lengths, ...).

        Args:
            frames: of the longest clip.
            whole: all clips have them.
        """
        wide = bucket_frames(frames)
        own, shared = (kind, batch, frames, True, *rest), (kind, batch, wide, False, *rest)
        last, count = self._rows.pop(kind, (None, 0))
        if wide is None or not whole or own in self._too_large:
            return shared
        recorded = self._recordings.get(shared)
        # Beside the bucket's it may not cost others theirs.
        fits = recorded is None or self.held_bytes() + recorded.bytes <= self.cap_bytes
        if own in self._recordings or (frames == wide and fits):
            return own
        if frames == wide or recorded is None or not fits:
            return shared
        if own in self._seen:  # to be recorded now
            return own
        self._rows[kind] = own, count + 1 if own == last else 1
        if self._rows[kind][1] <= _IN_A_ROW:
            return shared
        self._seen.add(own)
        return own

    def _find(self, key: Any, record: Callable[[], _Recording]) -> _Recording | None:
        """Return the bucket's recording, made now where this is its second call; None: run without one."""
        _, batch, wide = key[:3]
        if self.recorder is None or not batch or wide is None or self.cap_bytes == 0 or key in self._too_large:
            return None
        if self.engine.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        if key in self._recordings:
            self._recordings.move_to_end(key)
        elif key not in self._seen:
            self._seen.add(key)
            return None
        else:
            with torch.inference_mode(False):  # or calls outside of it could not fill its inputs
                recording = record()
            if bucket_frames(wide) != wide:
                self._seen.discard(key)  # once it is dropped it has to come in a row again
            shared, own = (*key[:3], False, *key[4:]), (*key[:3], True, *key[4:])
            if recording.bytes > self.cap_bytes:
                self._too_large |= {shared, own} if bucket_frames(wide) == wide else {own}
                return None
            if self.held_bytes() + recording.bytes > self.cap_bytes and own in self._recordings:
                self._drop(own)  # the bucket's serves its calls too
            while self._recordings and self.held_bytes() + recording.bytes > self.cap_bytes:
                self._drop(next(iter(self._recordings)))
            recording.key = key
            self._recordings[key] = recording
            if recording.again is not None:
                self._again[recording.shape] = recording
        found = self._recordings[key]
        found.wait()
        return found

    def _drop(self, key: Any) -> None:
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize(self.engine.device)  # its memory may not go to others while a replay still runs
        dropped = self._recordings.pop(key)
        if dropped.again is not None:
            del self._again[dropped.shape]

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        """Make the engine's device the current one, whose streams and graphs are used."""
        device = self.engine.device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return contextlib.nullcontext()
        return torch.cuda.device(device)

    def _fill(self, recording: _Recording, name: str, value: Tensor) -> None:
        to = recording.inputs[name]
        (to if to.shape == value.shape else to[..., : value.shape[-1]]).copy_(value)

    def _fill_lengths(
        self, recording: _Recording, lengths: tuple[Sequence[int] | None, ...], rows: Callable[..., Tensor]
    ) -> None:
        if recording.lengths != lengths:
            tensors = [None if n is None else torch.tensor(n, dtype=torch.int64) for n in lengths]
            recording.inputs["lengths"].copy_(rows(*tensors))
            recording.lengths = lengths

    def _record(self, inputs: dict[str, Tensor], run: Run) -> _Recording:
        assert self.recorder is not None
        with torch.no_grad():
            replay, outputs, held = self.recorder.record(run)
        held += sum(x.numel() * x.element_size() for x in inputs.values())
        return _Recording(inputs, replay, outputs, held)

    def _record_decode(self, batch: int, frames: int, whole: bool, stages: int) -> _Recording:
        engine, device = self.engine, self.engine.device
        codes = [CodeInput(torch.zeros(batch, 1, frames, dtype=torch.int64, device=device), engine.semantic_entries)]
        if stages:
            acoustic = torch.zeros(batch, stages, frames, dtype=torch.int64, device=device)
            codes.append(CodeInput(acoustic, engine.acoustic_entries))
        inputs = dict(zip(("semantic", "acoustic"), (given.to for given in codes), strict=False))
        rows_of: Tensor | None = None
        if not whole:
            rows_of = engine.decode_lengths(torch.arange(frames + 1))
            inputs["lengths"] = rows_of[:, torch.full((batch,), frames)].to(device)

        def run() -> tuple[Tensor, ...]:
            return (engine.decode(inputs["semantic"], inputs.get("acoustic"), inputs.get("lengths")),)

        made = self._record(inputs, run)
        made.codes, made.rows_of = tuple(codes), rows_of
        if whole and made.outputs[0].shape[-1] == engine.decoded_samples(frames):
            made.again = again_of(made.replay, codes, made.outputs[0])
        return made

    def _record_encode(
        self, batch: int, frames: int, whole: bool, acoustic: bool, num_quantizers: int | None, like: Tensor
    ) -> _Recording:
        engine, device = self.engine, self.engine.device
        inputs = {"features": torch.zeros(batch, like.shape[1], frames, dtype=engine.dtype, device=device)}
        if acoustic:
            samples = frames * engine.hop_samples
            inputs["audio"] = torch.zeros(batch, 1, samples, dtype=engine.dtype, device=device)
        if not whole:
            full = torch.full((batch,), frames)
            inputs["lengths"] = engine.encode_lengths(full, full * engine.hop_samples if acoustic else None).to(device)

        def run() -> tuple[Tensor, ...]:
            codes = engine.encode(inputs.get("audio"), inputs["features"], num_quantizers, inputs.get("lengths"))
            return tuple(c for c in codes if c is not None)

        return self._record(inputs, run)
