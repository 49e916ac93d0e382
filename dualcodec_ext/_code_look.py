"""Codes on their way into a recording, and the answer whether all are in range: it is there before the recording has
run, so that a call need not wait for its audio."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from . import build


@dataclass(frozen=True)
class CodeInput:
    """Where a recording reads codes, and how many entries their codebooks have.

    Args:
        to: [B, q, W] int64.
        entries: of each codebook.
    """

    to: Tensor
    entries: int


def shapes_of(semantic: object, acoustic: object) -> tuple[torch.Size, torch.Size | None] | None:
    """Return the shapes of codes as they were given, by which a recording is found; None where they are no codes."""
    if not isinstance(semantic, Tensor) or not isinstance(acoustic, Tensor | None):
        return None
    return semantic.shape, None if acoustic is None else acoustic.shape


class CodeLook:
    """Brings the codes of one call at a time into a recording's inputs, and looks at them.

    Args:
        device: of the recording.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.inference_mode(False):  # or calls outside of it could not clear it
            # None: on the CPU. Else the compiled module's, with the event that says when `wrong` stands.
            self.compiled: Any = _compiled().Look(device.index or 0) if device.type == "cuda" else None
            self._wrong = torch.zeros(1, dtype=torch.int64) if self.compiled is None else self.compiled.wrong

    def take(self, inputs: Sequence[CodeInput], codes: Sequence[Tensor]) -> None:
        """Copy codes [B, q, F], F up to W, to where they are read.

        Args:
            inputs: one or two.
            codes: for each, of any device and integer type.
        """
        codes = [c.to(self._device) for c in codes]
        if self.compiled is None:
            self._wrong.zero_()
            for given, c in zip(inputs, codes, strict=True):
                given.to[..., : c.shape[-1]].copy_(c)
                self._wrong |= ((c < 0) | (c >= given.entries)).any()
            return
        self.compiled.clear()
        parts: list[Any] = [x for given, c in zip(inputs, codes, strict=True) for x in (given.to, c, given.entries)]
        torch.ops.dualcodec_ext.take_codes(*(parts if len(inputs) == 2 else [*parts, None, None, 0]), self._wrong)
        self.compiled.record()

    def fine(self) -> bool:
        """Return whether all codes of the last `take` are in range; waits for it, and for nothing that came behind."""
        return not self._wrong.item() if self.compiled is None else bool(self.compiled.fine())


class Again(Protocol):
    """Starts a recording for codes of one shape: what a call waits for before the GPU begins is little more."""

    def start(self, look: CodeLook, semantic: Tensor, acoustic: Tensor | None, out: Tensor | None) -> Tensor | None:
        """Bring codes, replay, and copy the audio.

        Args:
            look: tells of the codes afterwards.
            semantic, acoustic: [B, 1, F] and [B, q, F]; of int64, on the recording's device and of its inputs' shapes.
            out: what the audio is written to; None: a new tensor.

        Returns:
            The audio, with the output's strides unless it is `out`; None, and nothing was started, where codes are not
            so, or this is no moment for a replay.
        """
        ...

    def wait(self) -> None:
        """Make the current stream wait for the recording's last use."""
        ...

    def release(self) -> None:
        """End a use of the recording on the current stream."""
        ...


class PlainAgain:
    """As the compiled `Replay`, for recordings that are no CUDA graphs.

    Args:
        replay: runs the recording.
        inputs: one or two.
        output: the recording's audio.
    """

    def __init__(self, replay: Callable[[], object], inputs: Sequence[CodeInput], output: Tensor) -> None:
        self._replay, self._inputs, self._output = replay, inputs, output

    def start(self, look: CodeLook, semantic: Tensor, acoustic: Tensor | None, out: Tensor | None) -> Tensor | None:
        codes = [semantic] if acoustic is None else [semantic, acoustic]
        if len(codes) != len(self._inputs) or not all(map(_fits, codes, self._inputs)):
            return None
        look.take(self._inputs, codes)
        if not look.fine():  # where lookups would raise
            return None
        self._replay()
        return (torch.empty_like(self._output) if out is None else out).copy_(self._output)

    def wait(self) -> None:
        pass

    def release(self) -> None:
        pass


class _CompiledAgain:
    """The compiled module's `Replay`.

    Args:
        graph: as its `replay` is the recording's.
        inputs, output: as for PlainAgain.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, inputs: Sequence[CodeInput], output: Tensor) -> None:
        made = _compiled().Replay(graph, [(given.to, given.entries) for given in inputs], output)
        self._start, self.wait, self.release = made.start, made.wait, made.release

    def start(self, look: CodeLook, semantic: Tensor, acoustic: Tensor | None, out: Tensor | None) -> Tensor | None:
        audio: Tensor | None = self._start(look.compiled, semantic, acoustic, out)
        return audio


def again_of(replay: Callable[[], object], inputs: Sequence[CodeInput], output: Tensor) -> Again | None:
    """Return what starts a recording of a decode; None on a GPU for what is no CUDA graph.

    Args:
        replay: runs the recording.
        inputs: all that it reads.
        output: its audio, as long as that of the codes.
    """
    graph = getattr(replay, "__self__", None)
    if isinstance(graph, torch.cuda.CUDAGraph):
        return _CompiledAgain(graph, inputs, output)
    return PlainAgain(replay, inputs, output) if output.device.type == "cpu" else None


def _compiled() -> Any:
    module = build.load_module()
    assert module is not None  # an engine on a GPU has it
    return module


def _fits(codes: Tensor, given: CodeInput) -> bool:
    return codes.dtype == torch.int64 and codes.device == given.to.device and codes.shape == given.to.shape
