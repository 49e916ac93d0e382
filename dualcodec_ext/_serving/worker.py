"""A thread that steps every slot that has something to do, together as far as their frames allow."""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .stages import MOST_FRAMES, Stage

if TYPE_CHECKING:
    from .stages import Array

# Times the last step. Of 0.5 to 2.5, tried with 8 and 32 clients of `python -m bench serve` on 2 cores: below 1.5 many
# clients wait for steps of too few slots, above it few ones wait for each other.
_PATIENCE = 1.5
log = logging.getLogger(__name__)


@dataclass
class Clip:
    """What has come of a clip and was not worked on: parts along their first axis."""

    parts: deque[Array] = field(default_factory=deque)
    count: int = 0
    ended: bool = False

    def take(self, count: int) -> Array:
        """Up to `count` entries from the front, which go."""
        taken = []
        while count and self.parts:
            part = self.parts.popleft()
            if len(part) > count:
                self.parts.appendleft(part[count:])
                part = part[:count]
            taken.append(part)
            count -= len(part)
            self.count -= len(part)
        return taken[0] if len(taken) == 1 else np.concatenate(taken)


class Lane:
    """One stream's way through one worker.

    Args:
        owner: whom the results are for.
        slot: of the stage.
        codebooks: of its frames; lanes with different ones don't step together where they are an input.
    """

    def __init__(self, owner: Any, slot: int, codebooks: int) -> None:
        self.owner, self.slot, self.codebooks = owner, slot, codebooks
        self.clips = deque([Clip()])
        self.fresh = True  # the slot may hold what another stream left there
        self.paused = False
        self.fed_s = float("-inf")

    def add(self, part: Array, ended: bool) -> None:
        clip = self.clips[-1]
        if len(part):
            clip.parts.append(part)
            clip.count += len(part)
        if ended:
            clip.ended = True
            self.clips.append(Clip())


@dataclass
class Job:
    """Frames of one lane, or no frames where its clip ends."""

    lane: Lane
    part: Array | None
    frames: int
    ends: bool


@dataclass
class Result:
    """What came of a job."""

    lane: Lane
    given: Array | None  # the job's part
    found: Array | None
    frames: int
    ended: bool
    failure: str | None = None


class Worker:
    """Steps one stage's slots in a thread of its own.

    A step takes every lane that has a frame. Lanes that are due are waited for, at most half as long again as the last
    step took: the more there is to do, the more of them step together.

    Args:
        stage: what does the work; nobody else touches it.
        slots: it has.
        frame_s: the length of a frame.
        done: is given the results of each step, in the worker's thread.
        observe: is told of every pass: its slots, frames and seconds.
    """

    def __init__(
        self,
        stage: Stage,
        slots: int,
        frame_s: float,
        done: Callable[[Sequence[Result]], None],
        observe: Callable[[int, int, float], None],
    ) -> None:
        self.stage = stage
        self._frame_s, self._done, self._observe = frame_s, done, observe
        self._lanes: list[Lane | None] = [None] * slots
        self._changed = threading.Condition()
        self._stopped = False
        self._patience_s = 0.0  # until when lanes that are due are waited for
        self._missing: set[Lane] | None = None  # those, while they are; None: the thread does not wait for any
        self._thread = threading.Thread(target=self._run, name=f"dualcodec-{stage.name}", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after the step in progress, and wait for that."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def open(self, owner: Any, codebooks: int) -> Lane | None:
        """Takes a free slot; None where there is none."""
        with self._changed:
            for slot, lane in enumerate(self._lanes):
                if lane is None:
                    self._lanes[slot] = lane = Lane(owner, slot, codebooks)
                    return lane
        return None

    def close(self, lane: Lane) -> None:
        """Frees a lane's slot; what it still had to do is forgotten."""
        with self._changed:
            if self._lanes[lane.slot] is lane:
                self._lanes[lane.slot] = None
                self._changed.notify()

    def put(self, parts: Sequence[tuple[Lane, Array, bool]]) -> None:
        """Gives lanes more to do.

        Args:
            parts: lane, samples [n] or codes [F, codebooks], and whether the clip ends behind them.
        """
        now = time.monotonic()
        with self._changed:
            for lane, part, ended in parts:
                lane.add(part, ended)
                lane.fed_s = now
                if self._missing is not None and self._ready(lane):
                    self._missing.discard(lane)
            if not self._missing:  # waking it for each of many streams would cost more than it brings
                self._changed.notify()

    def pause(self, lane: Lane, paused: bool) -> None:
        """Leaves a lane out for a while."""
        with self._changed:
            lane.paused = paused
            self._changed.notify()

    # In the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (jobs := self._collect()) is not None:
            begun = time.monotonic()
            groups: defaultdict[tuple[int, int], list[Job]] = defaultdict(list)
            for job in jobs:
                groups[job.frames, job.lane.codebooks if self.stage.unit == 1 else 0].append(job)
            for (frames, _), group in sorted(groups.items()):
                self._done(self._work(group, frames))
            now = time.monotonic()
            self._patience_s = now + min(_PATIENCE * (now - begun), self._frame_s)

    def _collect(self) -> list[Job] | None:
        """Waits for something to do; None: no more."""
        with self._changed:
            while not self._stopped:
                now = time.monotonic()
                ready, due = [], set()
                for lane in self._lanes:
                    if lane is None or lane.paused:
                        continue
                    if self._ready(lane):
                        ready.append(lane)
                    elif now - lane.fed_s < 2 * self._frame_s:
                        due.add(lane)
                hurry = any(lane.clips[0].count >= MOST_FRAMES * self.stage.unit for lane in ready)
                if ready and (hurry or not due or now >= self._patience_s):
                    return [self._take(lane) for lane in ready]
                self._missing = due if ready else None
                self._changed.wait(self._patience_s - now if ready else None)
                self._missing = None
        return None

    def _ready(self, lane: Lane) -> bool:
        return lane.clips[0].ended or lane.clips[0].count >= self.stage.unit

    def _take(self, lane: Lane) -> Job:
        clip, unit = lane.clips[0], self.stage.unit
        whole = clip.count // unit
        if whole:
            frames = min(MOST_FRAMES, 1 << (whole.bit_length() - 1))
            part = clip.take(frames * unit)
        elif clip.count:  # a clip's last samples, and zeros
            last = clip.take(clip.count)
            frames, part = 1, np.pad(last, (0, unit - len(last)))
        else:
            frames, part = 0, None
        ends = clip.ended and not clip.count
        if ends:
            lane.clips.popleft()
        return Job(lane, part, frames, ends)

    def _work(self, group: Sequence[Job], frames: int) -> list[Result]:
        slots = [job.lane.slot for job in group]
        begun = time.perf_counter()
        try:
            found: list[Array | None] = [None] * len(group)
            if fresh := [job.lane.slot for job in group if job.lane.fresh]:
                self.stage.reset(fresh)
                for job in group:
                    job.lane.fresh = False
            if frames:
                found = list(self.stage.run(slots, [job.part for job in group if job.part is not None], frames))
                self._observe(len(slots), frames, time.perf_counter() - begun)
            if ending := [i for i, job in enumerate(group) if job.ends]:
                for i, rest in zip(ending, self.stage.end([slots[i] for i in ending]), strict=True):
                    if len(rest):
                        before = found[i]
                        found[i] = rest if before is None else np.concatenate([before, rest])
        except Exception as error:
            log.exception("a step failed")
            self.stage.reset(slots)
            text = " ".join(f"{type(error).__name__}: {error}".split())
            return [Result(job.lane, None, None, 0, True, text) for job in group]
        return [self._result(job, x) for job, x in zip(group, found, strict=True)]

    def _result(self, job: Job, found: Array | None) -> Result:
        if found is not None and not np.isfinite(found).all():
            return Result(job.lane, None, None, 0, True, "the model's output is not finite")
        return Result(job.lane, job.part, found, job.frames, job.ends)
