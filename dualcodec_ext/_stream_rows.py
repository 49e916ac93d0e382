"""The rows that a recorded pass works in: every layer's input in one tensor, where the layer in front writes it.

A pass brings all layers' contexts in front of their rows, computes layer by layer, and takes the last rows of every
input back as the next contexts: two copies for all layers together, one kernel each on CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ._stream_cpu import Chain
from .stages import stage_of
from .steps import ConvNeXtStep, ConvStep, ResidualUnitStep, Step, UpsampleStep

NO_ERROR = torch.iinfo(torch.int64).max  # of a lookup's error, where no code is out of range
_ALIGNED = 64  # elements: a layer's rows begin on whole vectors, whatever the dtype


@dataclass(frozen=True)
class Inlet:
    """The input of a layer.

    Args:
        offset: of its context in a slot's state.
        context, fresh, missing: its rows: those kept, those that a pass brings, and zeros behind them.
        channels: of a row.
    """

    offset: int
    context: int
    fresh: int
    missing: int
    channels: int

    @property
    def numel(self) -> int:
        return (self.context + self.fresh + self.missing) * self.channels


def inlets_of(chain: Chain, frames: int) -> list[Inlet]:
    """Return the inputs of a chain's layers in a pass of so many frames."""
    offset, found = int(chain.state.storage_offset()), []
    for layer, channels in zip(chain.layers, chain.channels, strict=True):
        assert frames == 1 or not layer.missing, "what is missing depends on where a frame ends"
        found.append(Inlet(offset, layer.context, frames * layer.in_rows, layer.missing, channels))
        offset += layer.context * channels
    return found


def copy_runs(
    to: Tensor,
    source: Tensor,
    to_at: Sequence[int],
    source_at: Sequence[int],
    counts: Sequence[int],
    kept: Tensor | None,
    error: Tensor,
) -> None:
    """Copy runs of counts[i] elements of every row from source [B, M] to [B, N].

    Args:
        kept: [B] bool, the rows that are copied, none of them where `error` tells of one; None: all, and `error`
            becomes NO_ERROR.
        error: [1] int64.
    """
    if to.device.type == "cuda":
        torch.ops.dualcodec_ext.stream_rows(to, source, to_at, source_at, counts, kept, error)
        return
    take = None if kept is None else (kept & (error == NO_ERROR))[:, None]
    if take is None:
        error.fill_(NO_ERROR)
    for at, begin, count in zip(to_at, source_at, counts, strict=True):
        place, rows = to[:, at : at + count], source[:, begin : begin + count]
        place.copy_(rows if take is None else torch.where(take, rows, place))


class Rows:
    """The inputs of layers for all slots.

    Args:
        state: [B, numel], of which the contexts are.
        inlets: of the layers.
    """

    def __init__(self, state: Tensor, inlets: Sequence[Inlet]) -> None:
        self._state, self._inlets, self._at = state, list(inlets), [0]
        for inlet in self._inlets:
            self._at.append(self._at[-1] + -(-inlet.numel // _ALIGNED) * _ALIGNED)
        self.memory = state.new_zeros(state.shape[0], self._at[-1])
        some = [(at, x) for at, x in zip(self._at, self._inlets, strict=False) if x.context]
        self._offsets = [x.offset for _, x in some]
        self._counts = [x.context * x.channels for _, x in some]
        self._begins = [at for at, _ in some]
        self._ends = [at + x.fresh * x.channels for at, x in some]

    def bytes(self) -> int:
        return self.memory.numel() * self.memory.element_size()

    def whole(self, i: int) -> Tensor:
        """Return the rows of input i [B, C, context + fresh + missing], channels-last."""
        x, at = self._inlets[i], self._at[i]
        batch, pitch = self.memory.shape
        return self.memory.as_strided((batch, x.channels, x.numel // x.channels), (pitch, 1, x.channels), at)

    def fresh(self, i: int) -> Tensor:
        """Return those [B, C, fresh] that a pass brings."""
        x = self._inlets[i]
        return self.whole(i)[:, :, x.context : x.context + x.fresh]

    def bring(self, error: Tensor) -> None:
        """Put the contexts in front of the rows, and NO_ERROR into error [1]."""
        copy_runs(self.memory, self._state, self._begins, self._offsets, self._counts, None, error)

    def take(self, kept: Tensor, error: Tensor) -> None:
        """Make the last rows the contexts of the slots in kept [B], where error [1] tells of none."""
        copy_runs(self._state, self.memory, self._offsets, self._ends, self._counts, kept, error)


def signal(like: Tensor, channels: int, count: int) -> Tensor:
    """Return rows [B, channels, count] for the slots of like, channels-last."""
    return like.new_empty(like.shape[0], count, channels).transpose(1, 2)


def run_into(y: Tensor, step: Step, x: Tensor, first: int) -> None:
    """Compute what a step makes of x without padding; of an upsampling y's rows from its row `first` on."""
    if isinstance(step, UpsampleStep) and step.packed.is_cuda and first % step.stride:
        y.copy_(step(x, None)[:, :, first : first + y.shape[2]])  # its stretches begin on whole strides
    elif isinstance(step, UpsampleStep):
        step.into(y, x, first)
    elif isinstance(step, ConvNeXtStep):
        count = y.shape[2]
        step.into(y, x, signal(y, y.shape[1], count), signal(y, step.expand.weight.shape[0], count))
    else:
        assert isinstance(step, ConvStep | ResidualUnitStep)
        step.into(y, x)


def later(step: UpsampleStep, rows: int) -> UpsampleStep:
    """Return the step whose output begins so many rows later, fewer than its stride.

    On CUDA a stretch begins on a whole stride: with more padding it does, and the phases' weights in another order.
    A repeat's phases have different numbers of taps, and stay in their places.
    """
    assert step.mode == "transposed" and step.packed.dim() == 1, "phases of one form alone can change places"
    matrices = step.packed.view(2 * step.stride, -1)  # two of a phase
    left, right = step.padding
    return replace(step, packed=matrices.roll(-2 * rows, 0).flatten(), padding=(left + rows, right))


class GraphChain:
    """A chain whose passes are recorded.

    Args:
        chain: the layers and their state.
    """

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self._steps: list[tuple[Step, int]] = []
        for layer in chain.layers:
            step = layer.step
            first = -layer.out_delay - layer.first * layer.out_rows // layer.in_rows
            if isinstance(step, UpsampleStep) and step.packed.is_cuda and step.mode == "transposed":
                rest = first % step.stride
                step, first = later(step, rest) if rest else step, first - rest
            self._steps.append((step, first))

    def through(self, rows: Rows, at: int, frames: int, outlet: Tensor, bounds: Sequence[Tensor] | None = None) -> None:
        """Compute the rows outlet [B, C, frames * out_rows] from what stands in `rows`.

        Args:
            rows: inputs `at` and following are the layers'.
            bounds: per layer [B, 2] int64, which of its output rows lie in the slots' clips, others become zeros; None:
                all.
        """
        for i, (layer, (step, first)) in enumerate(zip(self.chain.layers, self._steps, strict=True)):
            count = frames * layer.out_rows
            stop = stage_of(layer.step).stop(count - 1 - layer.out_delay) - layer.first
            y = outlet if i == len(self._steps) - 1 else rows.fresh(at + i + 1)
            run_into(y, step, rows.whole(at + i)[:, :, :stop], first)
            if bounds is not None:
                row = torch.arange(count, device=y.device)
                inside = (row >= bounds[i][:, :1]) & (row < bounds[i][:, 1:])
                y.masked_fill_(~inside[:, None], 0)
