"""Stages as layers of a stream: which rows each one keeps, and how far it runs behind.

Every step brings whole frames, and every layer then computes the rows of as many frames, the newest ones that what has
come suffices for. A layer's rows so lie a fixed number behind the frames: its delay. What it keeps between steps are
the input rows that later output rows still need: its context, of fixed size too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .stages import Stage, UpsampleStage, stage_of
from .steps import Step

_FAR = 1 << 20  # frames: past every clip's beginning, where stages' arithmetic has no edge


@dataclass(frozen=True)
class Layer:
    """A step of the inference program in a stream.

    Args:
        step: the step.
        in_rows: input rows that a frame brings.
        out_rows: output rows that a frame brings.
        in_delay: input rows between the newest one and the end of the newest frame.
        out_delay: as `in_delay`, of output rows.
        context: input rows that are kept from one step to the next.
        missing: rows past the newest one that count as zeros, because the look-ahead is cut.
    """

    step: Step
    in_rows: int
    out_rows: int
    in_delay: int
    out_delay: int
    context: int
    missing: int

    @property
    def first(self) -> int:
        """The input row that the context begins with, where the step's frames begin at 0."""
        return -self.in_delay - self.context


def _rate(stage: Stage, in_rows: int) -> int:
    if isinstance(stage, UpsampleStage):
        return in_rows * stage.stride
    return stage.computable(_FAR * in_rows) - stage.computable((_FAR - 1) * in_rows)


def make_layers(
    steps: Sequence[Step], in_rows: int = 1, in_delay: int = 0, cuts: Sequence[int] | None = None
) -> list[Layer]:
    """Return the layers of steps, one behind the other.

    Args:
        steps: of the inference program.
        in_rows: rows of the first one's input that a frame brings.
        in_delay: of those rows.
        cuts: for each step, rows of its output that come earlier than they can be known; None: exact.
    """
    layers = []
    for i, step in enumerate(steps):
        stage = stage_of(step)
        out_rows, there = _rate(stage, in_rows), _FAR * in_rows - in_delay
        out_delay = _FAR * out_rows - stage.computable(there) - (0 if cuts is None else cuts[i])
        end = _FAR * out_rows - out_delay
        context = there - stage.first(end)
        missing = max(0, stage.stop(end - 1) - there)
        layers.append(Layer(step, in_rows, out_rows, in_delay, out_delay, max(0, context), missing))
        in_rows, in_delay = out_rows, out_delay
    return layers


def whole_frames(layers: Sequence[Layer]) -> int:
    """Return the delay of layers that end in samples in frames, rounded up."""
    return -(-layers[-1].out_delay // layers[-1].out_rows)


def cuts_for(steps: Sequence[Step], frames: int) -> list[int]:
    """Return `cuts` for which the steps, from one row per frame on, look at most `frames` frames ahead.

    What a layer's look-ahead costs in time goes by its rate. The cheapest ones keep theirs whole; where the frames
    run out, the others keep as many rows as still fit.
    """
    layers = make_layers(steps)
    needs = [layer.out_delay - layer.in_delay * (layer.out_rows // layer.in_rows) for layer in layers]
    hop = layers[-1].out_rows
    left = frames * hop
    kept = [0] * len(layers)
    for i in sorted(range(len(layers)), key=lambda i: needs[i] * (hop // layers[i].out_rows)):
        row = hop // layers[i].out_rows
        kept[i] = min(needs[i], left // row)
        left -= kept[i] * row
    return [need - some for need, some in zip(needs, kept, strict=True)]


def totals(layers: Sequence[Layer], length: int) -> list[int]:
    """Return the rows of a clip that each layer gives, when the first one is given `length`."""
    found = []
    for layer in layers:
        length = stage_of(layer.step).total(length)
        found.append(length)
    return found
