"""Encoder and decoder as a worker sees them: the same number of frames of some slots in, numpy arrays out."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import DualCodecError
from ..streaming import StreamingDecoder, StreamingEncoder

if TYPE_CHECKING:
    import numpy.typing as npt

    from ..model import DualCodec

    Array = npt.NDArray[Any]
    Turn = contextlib.AbstractContextManager[Any]

_WARM_UP_S = 2.0  # at most: with hundreds of slots it would take minutes
MOST_FRAMES = 4  # of one pass: a stream with a backlog then holds others up no longer than that takes


class Stage(Protocol):
    """One direction of the codec; `unit` entries of a part are a frame."""

    name: str
    unit: int

    def silence(self, frames: int) -> Array:
        """A part of so many frames."""
        ...

    def run(self, slots: Sequence[int], parts: Sequence[Array], frames: int) -> list[Array]:
        """Steps slots by as many frames, and returns what each gets."""
        ...

    def end(self, slots: Sequence[int]) -> list[Array]:
        """Ends the slots' clips, and returns what is left of each."""
        ...

    def reset(self, slots: Sequence[int]) -> None:
        """Forgets the slots' clips."""
        ...


def _mask(batch: int, slots: Sequence[int]) -> list[bool]:
    taking_part = set(slots)
    return [b in taking_part for b in range(batch)]


class EncodeStage:
    """Samples float32 [F * hop] in, codes int64 [F, codebooks] out, all codebooks of them.

    Args:
        model: with a causal encoder and features of its own.
        slots: streams side by side.
        turn: held during a step.
    """

    name = "encode"

    def __init__(self, model: DualCodec, slots: int, turn: Turn | None = None) -> None:
        self._encoder = StreamingEncoder(model, slots, MOST_FRAMES)
        self._turn = turn or contextlib.nullcontext()
        self.unit = int(model.dac.hop_length)

    def silence(self, frames: int) -> Array:
        return np.zeros(frames * self.unit, np.float32)

    def run(self, slots: Sequence[int], parts: Sequence[Array], frames: int) -> list[Array]:
        audio = np.zeros((self._encoder.batch_size, 1, frames * self.unit), np.float32)
        for b, part in zip(slots, parts, strict=True):
            audio[b, 0] = part
        mask = _mask(self._encoder.batch_size, slots)
        with self._turn:
            semantic, acoustic = self._encoder.step(torch.from_numpy(audio), mask=mask)
            codes = (semantic if acoustic is None else torch.cat([semantic, acoustic], 1)).cpu().numpy()
        return [codes[b].T for b in slots]

    def end(self, slots: Sequence[int]) -> list[Array]:
        self.reset(slots)  # a clip's last frame comes filled with zeros, so nothing is left
        return [np.zeros((0, 1), np.int64)] * len(slots)

    def reset(self, slots: Sequence[int]) -> None:
        with self._turn:
            self._encoder.reset(_mask(self._encoder.batch_size, slots))


class DecodeStage:
    """Codes int64 [F, codebooks] in, samples float32 out.

    Args:
        model: any.
        slots: streams side by side.
        lookahead: as for StreamingDecoder.
        turn: held during a step.
    """

    name = "decode"
    unit = 1

    def __init__(self, model: DualCodec, slots: int, lookahead: int | None, turn: Turn | None = None) -> None:
        most = MOST_FRAMES if lookahead is None else None
        self._decoder = StreamingDecoder(model, slots, most, lookahead)
        self._turn = turn or contextlib.nullcontext()
        self._device = next(model.parameters()).device
        self._codebooks = 1 + int(model.settings["n_codebooks"])
        self.lookahead_frames = self._decoder.lookahead_frames

    def silence(self, frames: int) -> Array:
        return np.zeros((frames, self._codebooks), np.int64)

    def run(self, slots: Sequence[int], parts: Sequence[Array], frames: int) -> list[Array]:
        codebooks = parts[0].shape[1]
        rows = np.zeros((self._decoder.batch_size, codebooks, frames), np.int64)
        for b, part in zip(slots, parts, strict=True):
            rows[b] = part.T
        mask = _mask(self._decoder.batch_size, slots)
        with self._turn:
            codes = torch.from_numpy(rows).to(self._device)
            acoustic = codes[:, 1:] if codebooks > 1 else None
            return self._of(self._decoder.step(codes[:, :1], acoustic, mask), slots)

    def end(self, slots: Sequence[int]) -> list[Array]:
        with self._turn:
            return self._of(self._decoder.flush(_mask(self._decoder.batch_size, slots)), slots)

    def reset(self, slots: Sequence[int]) -> None:
        with self._turn:
            self._decoder.reset_slots(slots)

    def _of(self, audio: Tensor, slots: Sequence[int]) -> list[Array]:
        samples, counts = audio[:, 0].float().cpu().numpy(), self._decoder.sample_counts
        return [samples[b, : counts[b]] for b in slots]


def warm_up(stage: Stage, slots: int) -> None:
    """Makes steps of as many slots as will often step together, because the first one of each number takes longer."""
    begun = time.monotonic()
    for n in range(1, slots + 1):
        for frames in (1, 2):
            stage.run(range(n), [stage.silence(frames)] * n, frames)
        if time.monotonic() - begun > _WARM_UP_S:
            break
    stage.reset(range(slots))


def make_stages(
    model: DualCodec, slots: int, lookahead: int | None
) -> tuple[EncodeStage | None, DecodeStage, dict[str, str]]:
    """Makes the stages that a model has.

    Args:
        model: in eval mode.
        slots: streams side by side.
        lookahead: frames that decoded audio may run behind; None: as many as the model needs.
    Returns:
        The encoder, the decoder, and for each task that lacks one of them why.
    Raises:
        DualCodecError: the model can't stream at all.
    """
    # While one thread records a CUDA graph no other may allocate, or the recording fails.
    turn = threading.Lock() if next(model.parameters()).device.type == "cuda" else None
    decoder = DecodeStage(model, slots, lookahead, turn)
    if model.front_end is None:
        why = "the model computes no features of its own: those of w2v-BERT depend on the whole clip"
    else:
        try:
            return EncodeStage(model, slots, turn), decoder, {}
        except DualCodecError as error:
            why = str(error)
    return None, decoder, dict.fromkeys(("roundtrip", "encode"), why)
