"""Stages one behind the other, run stretch by stretch in memory of fixed size.

Every stage has a buffer [B, rows, C] for what it is given. Rows are written behind those that are there, the stage's
kernel turns as many as it can into rows behind those of the next buffer, and what later output rows still need stays.
Zeros before a clip's first row and behind its last one are rows like any others. A clip's bits do not depend on how
it is cut.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .stages import Rows, Stage

Arrived = Callable[[Tensor, int], None]


@dataclass(frozen=True)
class Pass:
    """How many output rows a stage computes at once: at most `most`, and at least `least` until the input has ended."""

    most: int
    least: int = 1


class Inlet:
    """What rows can be written into: `target`, write, `received`; at the end `close`.

    Args:
        batch: clips side by side.

    `lengths` are the clips' own; rows past them are made zero. `arrived(rows, first)` may change rows as they come.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.lengths: Sequence[int] | None = None
        self.arrived: Arrived | None = None
        self.end = 0  # rows received so far
        self.closed = False

    def space(self) -> int:
        raise NotImplementedError

    def target(self, count: int) -> Tensor:
        """Return memory [B, C, count] for the next rows, of which there is space."""
        raise NotImplementedError

    def _tail(self, count: int) -> Tensor:
        """Return what `target` returned."""
        raise NotImplementedError

    def received(self, count: int) -> None:
        """Take in the rows that have been written."""
        if self.arrived is not None:
            self.arrived(self._tail(count), self.end)
        if self.lengths is not None:
            rows = self._tail(count)
            for b, length in enumerate(self.lengths):
                if length < self.end + count:
                    rows[b, :, max(0, length - self.end) :].zero_()
        self.end += count

    def close(self) -> None:
        self.closed = True


class Output(Inlet):
    """A tensor [B, C, T] that is filled from its first step on."""

    def __init__(self, y: Tensor) -> None:
        super().__init__(y.shape[0])
        if y.shape[1] == 1:  # the same memory; kernels write channels-last rows without detours
            y = y.as_strided(y.shape, (y.stride(0), 1, y.stride(2)), y.storage_offset())
        self.y = y

    def space(self) -> int:
        return self.y.shape[2] - self.end

    def target(self, count: int) -> Tensor:
        return self._tail(count)

    def _tail(self, count: int) -> Tensor:
        return self.y[:, :, self.end : self.end + count]


class Sink(Inlet):
    """Takes rows and forgets them: the stage before it has put its results elsewhere."""

    def __init__(self, batch: int) -> None:
        super().__init__(batch)
        self._nothing = torch.empty(0)

    def space(self) -> int:
        return 1 << 62

    def target(self, count: int) -> Tensor:
        return self._nothing

    def _tail(self, count: int) -> Tensor:
        return self._nothing

    def received(self, count: int) -> None:
        self.end += count


class Given:
    """Rows [B, C, n] that come in parts, which are kept as they are until they have been taken."""

    def __init__(self) -> None:
        self._parts: deque[Tensor] = deque()
        self._first = self.end = 0  # the first row of the parts that are left, and the rows that have come
        self.closed = False

    def add(self, part: Tensor) -> None:
        self._parts.append(part)
        self.end += part.shape[2]

    def take(self, begin: int, target: Tensor) -> None:
        """Write the rows from `begin` on, behind those of the call before, and zeros past the last one."""
        at, count = 0, target.shape[2]
        while at < count and self._parts:
            part, skipped = self._parts[0], begin + at - self._first
            rows = part[:, :, skipped : skipped + count - at]
            target[:, :, at : at + rows.shape[2]].copy_(rows)
            at += rows.shape[2]
            if skipped + rows.shape[2] == part.shape[2]:
                self._first += part.shape[2]
                self._parts.popleft()
        target[:, :, at:].zero_()


class Buffer(Inlet):
    """Rows in memory of fixed size; those before `first` have gone.

    Args:
        batch: clips side by side.
        capacity: rows.
        channels: of a row.
        dtype: of the rows.
        zeros: how many of the capacity's rows are kept for zeros behind the last row.
    """

    def __init__(self, batch: int, capacity: int, channels: int, dtype: torch.dtype, zeros: int = 0) -> None:
        super().__init__(batch)
        self.rows = Rows(batch, capacity, channels, dtype)
        self.capacity, self.zeros = capacity, zeros
        self.first = self.origin = 0  # the first row that is still needed, and the one at the front of the memory

    def bytes(self) -> int:
        return self.rows.bytes()

    def restart(self, first: int, lengths: Sequence[int] | None) -> None:
        """Begin new clips: rows from `first`, at most 0, to 0 are zeros."""
        self.lengths, self.closed, self.arrived, self.end = lengths, False, None, 0
        self.first = self.origin = first
        if first < 0:
            self.rows.view(0, -first).zero_()

    def space(self) -> int:
        return self.capacity - self.zeros - (self.end - self.first)

    def target(self, count: int) -> Tensor:
        self._make_place(count, self.capacity - self.zeros)
        return self._tail(count)

    def between(self, begin: int, end: int) -> Tensor:
        """Return rows that are still there."""
        return self.rows.view(begin - self.origin, end - begin)

    def _tail(self, count: int) -> Tensor:
        return self.rows.view(self.end - self.origin, count)

    def _make_place(self, count: int, limit: int) -> None:
        if self.end - self.origin + count <= limit:
            return
        begin, kept = self.first - self.origin, self.end - self.first
        if kept > 0 and begin > 0:
            rows = self.rows.view(begin, kept)
            self.rows.view(0, kept).copy_(rows if kept <= begin else rows.clone())
        self.origin = self.first


class Node(Buffer):
    """A stage and what it is given.

    Args:
        stage: the stage, this node's own.
        plan: rows per pass.
        batch: clips side by side.
        arrival: rows that can always be written at once, whatever is still needed of those before.
        dtype: of the rows.
    """

    def __init__(self, stage: Stage, plan: Pass, batch: int, arrival: int, dtype: torch.dtype) -> None:
        unit = stage.granularity
        self.stage = stage
        self.plan = Pass(plan.most + -plan.most % unit, plan.least)
        one, least = (stage.stop(n - 1) - stage.first(0) for n in (unit, max(unit, plan.least)))
        # Zeros behind the last row; of a clip's length they depend on its remainder by a stride alone.
        zeros = max(0, *(stage.stop(stage.total(n) - 1) - n for n in range(64, 96)))
        # With the rows of one group twice, those that stay are copied to the front seldom, and past no other.
        super().__init__(batch, one + least + max(arrival, unit) + zeros, stage.in_channels, dtype, zeros)
        self.emitted = self.outputs = 0

    def restart_clips(self, lengths: Sequence[int] | None = None) -> None:
        """Begin new clips, of these lengths where they differ."""
        self.restart(min(0, self.stage.first(0)), lengths)
        self.emitted = 0
        self.outputs = 0  # of the whole clip, once it has ended

    @property
    def finished(self) -> bool:
        return self.closed and self.emitted == self.outputs

    def close(self) -> None:
        """End the input: what follows it are zeros."""
        super().close()
        self.outputs = self.stage.total(self.end)
        zeros = self.stage.stop(self.outputs - 1) - self.end if self.outputs > self.emitted else 0
        if zeros > 0:
            self._make_place(zeros, self.capacity)
            self._tail(zeros).zero_()

    def ready(self) -> int:
        """Return how many output rows can be computed now."""
        if self.closed:
            return self.outputs - self.emitted
        count = self.stage.computable(self.end) - self.emitted
        count -= count % self.stage.granularity
        return count if count >= self.plan.least else 0

    def run(self, count: int, out: Tensor) -> None:
        """Compute the next rows."""
        stage, o = self.stage, self.emitted
        begin = stage.first(o)
        stage.run(self.between(begin, stage.stop(o + count - 1)), begin, out, o)
        self.emitted += count
        self.first = min(stage.first(self.emitted), self.end)


class Pipeline:
    """Nodes one behind the other: rows written to `inlet` go as far as they get, and end in the outlet."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = list(nodes)
        self._chain: list[Inlet] = [*nodes]
        self._scratch: dict[tuple[int, ...], Rows] = {}  # stages use it one after the other
        for node in nodes:
            node.stage.prepare(partial(self._scratch_for, node))

    def _scratch_for(self, node: Node, place: int, channels: int) -> Rows:
        key = (place, node.plan.most, channels)
        if key not in self._scratch:
            self._scratch[key] = Rows(node.batch, node.plan.most, channels, node.rows.memory.dtype)
        return self._scratch[key]

    @property
    def inlet(self) -> Inlet:
        return self._chain[0]

    def bytes(self) -> int:
        return sum(rows.bytes() for rows in [*self._scratch.values(), *(node.rows for node in self.nodes)])

    def start(self, outlet: Inlet, lengths: Sequence[int] | None = None) -> None:
        """Begin new clips.

        Args:
            outlet: where the rows of the last stage go.
            lengths: the clips' input rows, where they differ.
        """
        for node in self.nodes:
            node.restart_clips(lengths)
            if lengths is not None:
                lengths = [node.stage.total(n) for n in lengths]
        outlet.lengths = lengths
        self._chain = [*self.nodes, outlet]

    def write(self, count: int) -> None:
        """Take in the rows that were written to `inlet.target(count)`, and compute."""
        self.inlet.received(count)
        self._run(0)

    def finish(self) -> None:
        """End the input, and compute what is left as far as the outlet has space."""
        self.inlet.close()
        self._run(0)

    def resume(self) -> None:
        """Go on where the outlet had no space."""
        for at in reversed(range(len(self.nodes))):
            self._run(at)

    def _run(self, at: int) -> None:
        if at == len(self.nodes):
            return
        node, after = self.nodes[at], self._chain[at + 1]
        while (count := self._count(node, after)) > 0:
            node.run(count, after.target(count))
            after.received(count)
            if node.finished:
                after.close()
            self._run(at + 1)
        if node.finished and not after.closed:
            after.close()
            self._run(at + 1)

    @staticmethod
    def _count(node: Node, after: Inlet) -> int:
        """Return how many rows the next pass computes."""
        ready = node.ready()
        if ready <= 0:
            return 0
        unit = node.stage.granularity
        # Even parts: a short one behind full ones would read the weights again for little.
        even = -(-ready // -(-ready // node.plan.most))
        count = min(even + -even % unit, ready, after.space())
        return count if count == ready else count - count % unit
