"""A stream's layers on the CPU: rows in memory that is there, the ops' `out=` overloads, put together once.

What a slot keeps between steps lies in one row of one tensor. A pass brings the rows of the slots that take part to the
front of working memory that all layers share, computes behind them, and takes back what the next pass needs; slots that
do not take part are not touched.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from . import build
from ._stream_plan import Layer, totals
from .stages import Rows, stage_of
from .steps import Step
from .tiles import Programs

Call = Callable[[], object]
Span = tuple[int, int]

_PASSES = 320  # kept, one for each number of slots, of frames and of codebooks


def in_channels(step: Step) -> int:
    return stage_of(step).in_channels


class Memory:
    """Working memory: rows [n, C, count], channels-last, at one of a few places of fixed size."""

    def __init__(self, dtype: torch.dtype, numels: Sequence[int]) -> None:
        with torch.inference_mode(False):
            self._places = [torch.empty(numel, dtype=dtype) for numel in numels]

    def rows(self, place: int, n: int, count: int, channels: int) -> Tensor:
        memory = self._places[place]
        assert n * count * channels <= memory.numel()
        return memory.as_strided((n, channels, count), (count * channels, 1, channels))

    def bytes(self) -> int:
        return sum(memory.numel() * memory.element_size() for memory in self._places)


class Program(Protocol):
    """Kernel launches and copies of the CPU, put together once: csrc/program.h."""

    def record(self, call: Call) -> None:
        """Put the kernels that call launches behind what there is; they are not run."""

    def keep(self, state: Tensor, rows: Tensor, into_state: bool) -> None:
        """Put a copy between rows [n, numel] and those of state [slots, numel] that a run names."""

    def zero(self, rows: Tensor) -> None:
        """Put zeros into rows."""

    def add(self, y: Tensor, x: Tensor) -> None:
        """Put y += x."""

    def run(self, slots: Sequence[int]) -> None:
        """Run everything in order; slots: those that take part."""


def new_program() -> Program:
    module = build.load_module()
    assert module is not None, "an engine on the CPU has it"
    made: Program = module.Program()
    return made


class Chain:
    """Layers one behind the other.

    Args:
        layers: their plan.
        state: [B, numel], the memory of every slot's context rows; zeros are a clip's beginning.
    """

    def __init__(self, layers: Sequence[Layer], state: Tensor) -> None:
        self.layers, self.state = list(layers), state
        self.channels = [in_channels(layer.step) for layer in layers]

    @staticmethod
    def state_numel(layers: Sequence[Layer]) -> int:
        """Return the elements of a slot's state."""
        return sum(layer.context * in_channels(layer.step) for layer in layers)

    def numel(self, n: int, frames: int) -> int:
        """Return the elements of working memory that the widest layer's input takes."""
        rows = (layer.context + frames * layer.in_rows + layer.missing for layer in self.layers)
        return max((n * count * channels for count, channels in zip(rows, self.channels, strict=True)), default=0)

    def _whole(self, i: int, memory: Memory, place: int, n: int, frames: int) -> Tensor:
        layer = self.layers[i]
        count = layer.context + frames * layer.in_rows + layer.missing
        return memory.rows((place + i) % 2, n, count, self.channels[i])

    def inlet(self, memory: Memory, place: int, n: int, frames: int, i: int = 0) -> Tensor:
        """Return where the new rows of layer i go, [n, C, frames * in_rows]."""
        layer = self.layers[i]
        return self._whole(i, memory, place, n, frames)[:, :, layer.context : layer.context + frames * layer.in_rows]

    def spans(self, frames: int, starts: Sequence[int], lengths: Sequence[int] | None) -> list[list[Span]]:
        """Return, layer by layer, which of a pass's output rows lie within each slot's clip.

        Args:
            frames: of the pass.
            starts: frames that each slot's clip has had before.
            lengths: of the clips, in input rows of the first layer; None: they go on.
        """
        ends = [None] * len(starts) if lengths is None else [totals(self.layers, length) for length in lengths]
        found = []
        for i, layer in enumerate(self.layers):
            most = frames * layer.out_rows
            found.append(
                [
                    span_of(start * layer.out_rows - layer.out_delay, most, None if end is None else end[i])
                    for start, end in zip(starts, ends, strict=True)
                ]
            )
        return found

    def record(
        self,
        program: Program,
        memory: Memory,
        place: int,
        n: int,
        frames: int,
        outlet: Tensor,
        spans: Sequence[Sequence[Span]] | None = None,
    ) -> None:
        """Put what turns the rows in `inlet` into those of `outlet` into a program.

        Args:
            program: its runs name the n slots.
            memory: places 0 and 1 are used.
            place: of the inlet.
            n: slots that take part.
            frames: of the pass.
            outlet: [n, C, frames * out_rows] of the last layer.
            spans: the rows within each slot's clip, others become zeros; None: all.
        """
        offset = 0
        made: dict[tuple[int, int, int], Rows] = {}

        def scratch(where: int, channels: int) -> Rows:
            return made.setdefault((where, channels, most), Rows(n, most, channels, self.state.dtype))

        for i, layer in enumerate(self.layers):
            whole, channels = self._whole(i, memory, place, n, frames), self.channels[i]
            fresh = frames * layer.in_rows
            if layer.context:
                keep(program, self.state, whole, offset, layer.context, 0, into_state=False)
            if layer.missing:
                assert frames == 1, "what is missing depends on where a frame ends"
                program.zero(whole[:, :, layer.context + fresh :])
            last = i == len(self.layers) - 1
            y = outlet if last else self.inlet(memory, place, n, frames, i + 1)
            most = frames * layer.out_rows
            inside = [(0, most)] * n if spans is None else spans[i]
            begin, end = min(a for a, _ in inside), max(b for _, b in inside)
            if end > begin:
                stage = stage_of(layer.step)
                stage.prepare(scratch)
                if stage.granularity > 1:  # its groups begin with every frame
                    unit = layer.out_rows
                    begin, end = begin - begin % unit, end + -end % unit
                first = stage.first(begin - layer.out_delay)
                stop = stage.stop(end - 1 - layer.out_delay)
                x, part = whole[:, :, first - layer.first : stop - layer.first], y[:, :, begin:end]
                apart = stage.granularity > 1 and end - begin > unit
                for rows, some in frame_by_frame(x, part, unit) if apart else [(x, part)]:
                    program.record(partial(stage.run, rows, first, some, begin - layer.out_delay))
            for b, (low, high) in enumerate(inside):
                if low > 0:
                    program.zero(y[b, :, :low])
                if high < most:
                    program.zero(y[b, :, high:])
            if layer.context:
                keep(program, self.state, whole, offset, layer.context, fresh, into_state=True)
            offset += layer.context * channels


def keep(
    program: Program, state: Tensor, whole: Tensor, offset: int, context: int, first: int, into_state: bool
) -> None:
    """Put the copy between `context` rows of whole [n, C, count], from row `first` on, and the slots' state there."""
    channels, count = whole.shape[1:]
    numel = context * channels
    flat = whole.as_strided((whole.shape[0], numel), (count * channels, 1), whole.storage_offset() + first * channels)
    program.keep(state[:, offset : offset + numel], flat, into_state)


def frame_by_frame(x: Tensor, y: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield parts of x [n, C, reach + T] and y [n, C, T], channels-last, that have `rows` of T each."""
    (n, channels, steps), reach = y.shape, x.shape[2] - y.shape[2]
    if n == 1:  # one clip's frames as clips side by side

        def beside(t: Tensor, count: int) -> Tensor:
            return t.as_strided((steps // rows, channels, count), (rows * t.stride(2), 1, t.stride(2)))

        yield beside(x, reach + rows), beside(y, rows)
        return
    for at in range(0, steps, rows):
        yield x[:, :, at : at + reach + rows], y[:, :, at : at + rows]


def span_of(first: int, most: int, total: int | None) -> Span:
    """Return which of `most` rows from row `first` on lie in 0..total."""
    low = min(max(-first, 0), most)
    high = most if total is None else min(max(total - first, low), most)
    return low, high


Made = TypeVar("Made")


class Kept(Generic[Made]):
    """What has been put together for passes that come again and again; what was used longest ago is forgotten."""

    def __init__(self) -> None:
        self._made: OrderedDict[tuple[object, ...], Made] = OrderedDict()

    def get(self, key: tuple[object, ...], make: Callable[[], Made]) -> Made:
        found = self._made.get(key)
        if found is None:
            with torch.inference_mode(False):  # a view made in that mode could not be written outside of it
                found = self._made[key] = make()
            while len(self._made) > _PASSES:
                self._made.popitem(last=False)
        else:
            self._made.move_to_end(key)
        return found


@dataclass
class Pass:
    """One pass: codes are written into `semantic` and `acoustic`, the checks and then the program fill `audio`."""

    semantic: Tensor  # [n, 1, frames] int64
    acoustic: Tensor | None  # [n, q, frames] int64
    audio: Tensor  # [n, 1, frames * hop]
    checks: list[Call]  # the calls that refuse a code out of range, before any state has changed
    program: Program


class DecoderState:
    """What the slots of a decoder keep between passes, one row each: zeros are a clip's beginning.

    Args:
        programs: of the engine.
        semantic: layers of the semantic decoder; none where the latent is added as it is.
        decoder: layers of the decoder.
        batch: slots.
        device: of the weights.
    """

    def __init__(
        self,
        programs: Programs,
        semantic: Sequence[Layer],
        decoder: Sequence[Layer],
        batch: int,
        device: torch.device | None = None,
    ) -> None:
        self.programs, self.dtype = programs, programs.dtype
        self._late = semantic[-1].out_delay if semantic else 0  # frames by which acoustic codes wait for semantic ones
        self._latent = in_channels(decoder[0].step)
        sizes = [Chain.state_numel(semantic), Chain.state_numel(decoder), self._late * self._latent]
        with torch.inference_mode(False):
            self.state = torch.zeros(batch, sum(sizes), dtype=self.dtype, device=device)
        self._semantic = Chain(semantic, self.state[:, : sizes[0]])
        self._decoder = Chain(decoder, self.state[:, sizes[0] : sizes[0] + sizes[1]])
        self._waiting = self.state[:, sizes[0] + sizes[1] :]

    def bytes(self) -> int:
        """Return the memory that does not depend on how many slots take part."""
        return self.state.numel() * self.state.element_size()

    def spans(self, frames: int, starts: Sequence[int], lengths: Sequence[int] | None) -> list[list[Span]]:
        """Return `Chain.spans` of the semantic decoder's layers and, behind them, the decoder's."""
        chains = (self._semantic, self._decoder)
        return [span for chain in chains for span in chain.spans(frames, starts, lengths)]

    def before_the_first_sample(self, starts: Sequence[int]) -> bool:
        """Whether a pass of slots that have had so many frames may bring rows from before their clips."""
        last = self._decoder.layers[-1]
        return min(starts) * last.out_rows < last.out_delay


class CpuDecoder(DecoderState):
    """Decodes passes of a few frames for some of the slots.

    Args:
        programs, semantic, decoder, batch: as for DecoderState.
        max_frames: of a pass.
    """

    def __init__(
        self, programs: Programs, semantic: Sequence[Layer], decoder: Sequence[Layer], batch: int, max_frames: int
    ) -> None:
        super().__init__(programs, semantic, decoder, batch)
        widest = max(chain.numel(batch, max_frames) for chain in (self._semantic, self._decoder))
        acoustic = batch * (self._late + max_frames) * self._latent
        audio = batch * max_frames * decoder[-1].out_rows
        self._memory = Memory(self.dtype, (widest, widest, acoustic, audio))
        self._made: Kept[Pass] = Kept()

    def bytes(self) -> int:
        return super().bytes() + self._memory.bytes()

    def run(
        self,
        slots: tuple[int, ...],
        semantic: Tensor | None,  # [n, 1, F] integers; None: nothing but the zeros behind the clips
        acoustic: Tensor | None,  # [n, q, F] integers
        frames: int,
        starts: Sequence[int],  # frames that each slot has had
        lengths: Sequence[int] | None,  # of the slots' clips, once they have ended
    ) -> Tensor:
        """Return [n, 1, F * hop], to be read before the next call."""
        if semantic is None:
            with torch.inference_mode(False):
                made = self._pass(len(slots), frames, None, self.spans(frames, starts, lengths))
        else:
            stages = 0 if acoustic is None else acoustic.shape[1]
            spans = self.spans(frames, starts, lengths) if self.before_the_first_sample(starts) else None
            made = self._find(len(slots), frames, stages, spans)
            made.semantic.copy_(semantic)
            if made.acoustic is not None and acoustic is not None:
                made.acoustic.copy_(acoustic)
        for call in made.checks:
            call()
        made.program.run(slots)
        return made.audio

    def check(self) -> None:
        """Raise where the last pass had a code out of range: here `run` itself has."""

    def _find(self, n: int, frames: int, stages: int, spans: Sequence[Sequence[Span]] | None) -> Pass:
        if spans is not None:
            with torch.inference_mode(False):
                return self._pass(n, frames, stages, spans)
        return self._made.get((n, frames, stages), lambda: self._pass(n, frames, stages, None))

    def _pass(self, n: int, frames: int, stages: int | None, spans: Sequence[Sequence[Span]] | None) -> Pass:
        """Put a pass together; stages: acoustic codebooks, None: there are no codes at all."""
        memory, late = self._memory, self._late
        before = len(self._semantic.layers)
        place = before % 2
        latent = self._decoder.inlet(memory, place, n, frames)
        inlet = self._semantic.inlet(memory, 0, n, frames) if self._semantic.layers else latent
        audio = memory.rows(3, n, frames * self._decoder.layers[-1].out_rows, 1)
        semantic = torch.zeros(n, 1, frames, dtype=torch.int64)
        acoustic = torch.zeros(n, stages, frames, dtype=torch.int64) if stages else None
        whole = memory.rows(2, n, late + frames, self._latent)
        checks: list[Call] = []
        if stages is None:
            checks.append(inlet.zero_)
        else:
            quantizer = self.programs.semantic_quantizer
            checks.append(partial(quantizer.lookup_into, inlet, semantic, None, None))
        program = new_program()
        if late or acoustic is not None:
            fresh = whole[:, :, late:]
            if acoustic is None:
                checks.append(fresh.zero_)
            else:
                quantizer = self.programs.acoustic_quantizer
                checks.append(partial(quantizer.lookup_into, fresh, acoustic, None, None))
            if late:
                keep(program, self._waiting, whole, 0, late, 0, into_state=False)
        inside = (None, None) if spans is None else (spans[:before], spans[before:])
        self._semantic.record(program, memory, 0, n, frames, latent, inside[0])
        if late or acoustic is not None:
            program.add(latent, whole[:, :, :frames])
            if late:
                keep(program, self._waiting, whole, 0, late, frames, into_state=True)
        self._decoder.record(program, memory, place, n, frames, audio, inside[1])
        return Pass(semantic, acoustic, audio, checks, program)
