"""The thread behind the server: every lane gets what its own input gives, in order, whatever the others do."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualcodec_ext._serving.stages import MOST_FRAMES
from dualcodec_ext._serving.worker import Result, Worker

UNIT = 3


class Doubler:
    """Doubles numbers, remembers the sum of each slot's clip, and gives that at its end."""

    name, unit = "double", UNIT

    def __init__(self, slots: int) -> None:
        self.sums = [0] * slots
        self.steps: list[tuple[tuple[int, ...], int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def silence(self, frames: int) -> Any:
        return np.zeros(frames * UNIT, np.int64)

    def run(self, slots: Sequence[int], parts: Sequence[Any], frames: int) -> list[Any]:
        self.gate.wait()
        assert len(set(slots)) == len(slots) == len(parts) and all(len(part) == frames * UNIT for part in parts)
        self.steps.append((tuple(slots), frames))
        for slot, part in zip(slots, parts, strict=True):
            self.sums[slot] += int(part.sum())
        return [2 * part for part in parts]

    def end(self, slots: Sequence[int]) -> list[Any]:
        found = [np.array([self.sums[slot]]) for slot in slots]
        self.reset(slots)
        return found

    def reset(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.sums[slot] = 0


def made(slots: int) -> tuple[Worker, Doubler, queue.Queue[Result]]:
    stage, results = Doubler(slots), queue.Queue[Result]()

    def done(some: Sequence[Result]) -> None:
        for result in some:
            results.put(result)

    return Worker(stage, slots, 0.02, done, lambda *_: None), stage, results


def clip_of(results: queue.Queue[Result], clips: int) -> dict[Any, list[list[int]]]:
    """What came for each owner, clip by clip, until so many have ended."""
    found: dict[Any, list[list[int]]] = {}
    while clips:
        result = results.get(timeout=120)
        assert result.failure is None
        own = found.setdefault(result.lane.owner, [[]])
        if result.found is not None:
            own[-1] += result.found.tolist()
        if result.ended:
            clips -= 1
            own.append([])
    return found


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 20), st.booleans()), max_size=25))
def test_every_clip_is_its_own(puts: list[tuple[int, int, bool]]) -> None:
    worker, _, results = made(3)
    lanes = [worker.open(owner, 1) for owner in "abc"]
    wanted: dict[str, list[list[int]]] = {owner: [[]] for owner in "abc"}
    worker.start()
    number = 0
    try:
        for owner, count, ended in [*puts, (0, 0, True), (1, 0, True), (2, 0, True)]:
            part = np.arange(number + 1, number + 1 + count)
            number += count
            own = wanted["abc"[owner]]
            own[-1] += part.tolist()
            lane = lanes[owner]
            assert lane is not None
            worker.put([(lane, part, ended)])
            if ended:
                own.append([])
        found = clip_of(results, sum(len(own) - 1 for own in wanted.values()))
    finally:
        worker.stop()
    for owner, clips in wanted.items():
        assert len(found[owner]) == len(clips)
        for got, clip in zip(found[owner][:-1], clips[:-1], strict=True):
            padded = clip + [0] * (-len(clip) % UNIT)
            assert got == [2 * x for x in padded] + [sum(clip)]


def test_lanes_step_together_and_a_backlog_in_larger_steps() -> None:
    worker, stage, results = made(3)
    lanes = [worker.open(i, 1) for i in range(3)]
    frame = np.ones(UNIT, np.int64)
    stage.gate.clear()
    worker.start()
    try:
        for lane in lanes:
            assert lane is not None
        first, second, third = [lane for lane in lanes if lane is not None]
        worker.put([(first, frame, False), (second, frame, False), (third, np.ones(11 * UNIT, np.int64), True)])
        stage.gate.set()
        clip_of(results, 1)
    finally:
        worker.stop()
    assert stage.steps == [((0, 1), 1), ((2,), MOST_FRAMES), ((2,), MOST_FRAMES), ((2,), 2), ((2,), 1)]


def test_a_lane_waits_while_it_is_paused() -> None:
    worker, _, results = made(2)
    first, second = worker.open(0, 1), worker.open(1, 1)
    assert first is not None and second is not None and worker.open(2, 1) is None
    worker.pause(first, True)
    worker.start()
    try:
        worker.put([(first, np.ones(UNIT, np.int64), True), (second, np.ones(UNIT, np.int64), True)])
        assert clip_of(results, 1).keys() == {1}
        worker.pause(first, False)
        assert clip_of(results, 1).keys() == {0}
    finally:
        worker.stop()


def test_a_slot_that_was_left_in_the_middle_begins_anew() -> None:
    worker, _, results = made(1)
    worker.start()
    try:
        left = worker.open("left", 1)
        assert left is not None
        worker.put([(left, np.full(UNIT, 100), False)])
        results.get(timeout=120)
        worker.close(left)
        taken = worker.open("new", 1)
        assert taken is not None
        worker.close(left)  # once more changes nothing
        assert worker.open("other", 1) is None
        worker.put([(left, np.full(UNIT, 100), True)])  # what comes late for it is not for the new one
        worker.put([(taken, np.ones(UNIT, np.int64), True)])
        assert clip_of(results, 1) == {"new": [[2, 2, 2, UNIT], []]}
    finally:
        worker.stop()
    assert results.empty()


def test_a_step_that_fails_is_told_to_its_lanes(caplog: pytest.LogCaptureFixture) -> None:
    worker, _, results = made(2)
    lane = worker.open("a", 1)
    assert lane is not None
    worker.start()
    try:
        worker.put([(lane, np.array(["x"] * UNIT), False)])
        failed = results.get(timeout=120)
        assert failed.failure is not None and "\n" not in failed.failure and failed.lane is lane
        worker.put([(lane, np.ones(UNIT, np.int64), True)])
        assert clip_of(results, 1) == {"a": [[2, 2, 2, UNIT], []]}
    finally:
        worker.stop()
    assert "a step failed" in caplog.text
