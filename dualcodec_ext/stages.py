"""Steps of the inference program as stages of a pipeline: which input rows an output row needs, and how a stretch of
output rows is computed from a stretch of input rows into memory that is there.

Rows count from a clip's first one; those before it and past its end are zeros. The sums behind an output row depend on
its taps and channels alone, so that a stretch has the bits of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .steps import ConvNeXtStep, ConvStep, ResidualUnitStep, Step, UpsampleStep

_VIEWS = 512  # kept per buffer; a call of one length needs a few


class Rows:
    """Memory [B, capacity, C], and its stretches as channels-last signals [B, C, n], made once each."""

    def __init__(self, batch: int, capacity: int, channels: int, dtype: torch.dtype) -> None:
        self.shape = (batch, capacity, channels)
        with torch.inference_mode(False):  # a tensor made in that mode could not be written outside of it
            self.memory = torch.empty(self.shape, dtype=dtype)
        self._views: dict[tuple[int, int], Tensor] = {}

    def view(self, begin: int, count: int) -> Tensor:
        key = (begin, count)
        found = self._views.get(key)
        if found is None:
            if len(self._views) >= _VIEWS:
                self._views.clear()
            batch, capacity, channels = self.shape
            strides = (capacity * channels, 1, channels)
            found = self._views[key] = self.memory.as_strided((batch, channels, count), strides, begin * channels)
        return found

    def bytes(self) -> int:
        return self.memory.numel() * self.memory.element_size()


Scratch = Callable[[int, int], Rows]


class Stage(Protocol):
    """What a pipeline asks of a stage; o: an output row, counted from the clip's first."""

    in_channels: int
    out_channels: int
    granularity: int  # output rows come in whole groups of so many, but for a clip's last ones

    def first(self, o: int) -> int:
        """Return the first input row that output row o, and no later one, needs; negative: zeros before the clip."""
        ...

    def stop(self, o: int) -> int:
        """Return the input row behind the last one that output row o needs."""
        ...

    def computable(self, end: int) -> int:
        """Return how many output rows the input rows before `end` suffice for, whatever follows them."""
        ...

    def total(self, length: int) -> int:
        """Return the output rows of a clip of `length` input rows."""
        ...

    def run(self, x: Tensor, begin: int, out: Tensor, o: int) -> None:
        """Compute out [B, Cout, n], output rows from o on, from x [B, Cin, m], input rows from begin = first(o) on."""
        ...

    def weight_bytes(self) -> int:
        """Return what a pass reads beside its rows."""
        ...

    def prepare(self, scratch: Scratch) -> None:
        """Get the memory that a pass needs between its kernels: scratch(place, channels)."""
        ...


class _Window:
    """A convolution: output row o needs `reach` input rows from o * stride - left on."""

    def __init__(self, reach: int, stride: int, padding: tuple[int, int]) -> None:
        assert reach >= stride, "a row that no output needs would have to be skipped"
        self.reach, self.stride, self.padding = reach, stride, padding
        self.granularity = 1

    def first(self, o: int) -> int:
        return o * self.stride - self.padding[0]

    def stop(self, o: int) -> int:
        return o * self.stride - self.padding[0] + self.reach

    def computable(self, end: int) -> int:
        return max(0, (end + self.padding[0] - self.reach) // self.stride + 1)

    def total(self, length: int) -> int:
        return self.computable(length + self.padding[1]) if length else 0

    def prepare(self, scratch: Scratch) -> None:
        return None


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _OpStage(_Window):
    """A convolution that is one op."""

    step: ConvStep | ResidualUnitStep

    def run(self, x: Tensor, begin: int, out: Tensor, o: int) -> None:
        self.step.into(out, x)

    def weight_bytes(self) -> int:
        return _bytes(self.step.packed)


class ConvStage(_OpStage):
    def __init__(self, step: ConvStep) -> None:
        self.out_channels, self.in_channels, taps = step.weight.shape
        super().__init__((taps - 1) * step.dilation + 1, step.stride, step.padding)
        self.step = step


class UnitStage(_OpStage):
    def __init__(self, step: ResidualUnitStep) -> None:
        self.in_channels = self.out_channels = step.tensors[1].shape[0]
        reach = 6 * step.dilation
        super().__init__(reach + 1, 1, (reach, 0) if step.causal else (reach // 2, reach // 2))
        self.granularity = step.granularity
        self.step = step


class BlockStage(_Window):
    """A ConvNeXt block; its two inner signals have no context of their own."""

    def __init__(self, step: ConvNeXtStep) -> None:
        self.in_channels = self.out_channels = step.weight.shape[0]
        super().__init__(step.weight.shape[1], 1, step.padding)
        self.step = step

    def prepare(self, scratch: Scratch) -> None:
        self._normed = scratch(0, self.in_channels)
        self._hidden = scratch(1, self.step.expand.weight.shape[0])

    def run(self, x: Tensor, begin: int, out: Tensor, o: int) -> None:
        count = out.shape[2]
        self.step.into(out, x, self._normed.view(0, count), self._hidden.view(0, count))

    def weight_bytes(self) -> int:
        return _bytes(self.step.expand.packed) + _bytes(self.step.contract.packed)


class UpsampleStage:
    """Output row o of an upsampling by S; a stretch of input rows keeps the phases, since it begins on a whole row."""

    def __init__(self, step: UpsampleStep) -> None:
        self.granularity = step.granularity
        self.repeat = step.mode == "repeat"
        shape = step.weight.shape
        self.in_channels, self.out_channels = (shape[1], shape[0]) if self.repeat else (shape[0], shape[1])
        self.step, self.stride, self.padding = step, step.stride, step.padding

    def first(self, o: int) -> int:
        left = self.padding[0]
        return (o - left) // self.stride if self.repeat else min((o + left) // self.stride - 1, o // self.stride)

    def stop(self, o: int) -> int:
        left, stride = self.padding[0], self.stride
        return ((o - left + 2 * stride - 1) // stride if self.repeat else (o + left) // stride) + 1

    def computable(self, end: int) -> int:
        left, right = self.padding
        if self.repeat:
            return max(0, (end - 2) * self.stride + left + 1)
        return max(0, end * self.stride - left - max(0, right - self.stride))

    def total(self, length: int) -> int:
        if not length:
            return 0
        if self.repeat:
            return max(0, (length - 2) * self.stride + sum(self.padding) + 1)
        return max(0, (length + 1) * self.stride - sum(self.padding))

    def prepare(self, scratch: Scratch) -> None:
        return None

    def run(self, x: Tensor, begin: int, out: Tensor, o: int) -> None:
        self.step.into(out, x, o - begin * self.stride)

    def weight_bytes(self) -> int:
        return _bytes(self.step.packed)


def stage_of(step: Step) -> Stage:
    """Return a new stage of a step; stages hold memory, steps are shared."""
    if isinstance(step, ConvStep):
        return ConvStage(step)
    if isinstance(step, UpsampleStep):
        return UpsampleStage(step)
    return UnitStage(step) if isinstance(step, ResidualUnitStep) else BlockStage(step)
