"""Streams between the event loop, which reads and writes sockets, and the workers, which run the model."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .metrics import Metrics
from .protocol import Drop, Hello, ModelInfo, codes_message, pcm_message
from .stages import DecodeStage, EncodeStage
from .worker import Lane, Result, Worker

if TYPE_CHECKING:
    from .stages import Array

# What a client could pile up without sending audio: clips that end, and messages that wait for it to read them.
_MOST_CLIPS = 16
_MOST_OUT_BYTES = 4 << 20


class Stream:
    """One client's stream as the event loop sees it; nothing here is called from another thread.

    Args:
        number: of the stream, for the log.
        hello: what the client asked for.
        model: what is served.
        lanes: the worker and lane of each direction that the task takes, the first one first.
        metrics: where the time to first audio goes.
    """

    def __init__(
        self, number: int, hello: Hello, model: ModelInfo, lanes: Sequence[tuple[Worker, Lane]], metrics: Metrics
    ) -> None:
        self.number, self.since_s = number, asyncio.get_running_loop().time()
        self.hello, self.lanes, self.closed = hello, list(lanes), False
        self._model, self._metrics = model, metrics
        self._unit = 1 if hello.task == "decode" else model.hop_samples
        self._held: list[Array] = []  # samples that make no whole frame yet
        self._held_count = 0
        self._frames = 0  # that wait in workers or are worked on
        self._clips: deque[float] = deque()  # when the first data of each unfinished clip came
        self._open_clip = False  # whether the last of them still gets data
        self._heard = False  # whether the first of them has had its first result
        self._out: deque[tuple[bytes | str, float]] = deque()
        self._out_bytes = 0
        self.out_s = 0.0
        self._paused = False
        self._sent_frames = self._sent_samples = 0
        self._failure: Drop | None = None
        self._changed = asyncio.Event()

    # In -------------------------------------------------------------------------------------------------------------

    @property
    def in_s(self) -> float:
        """Seconds that were taken in and have not come out of the model."""
        return self._frames * self._model.frame_s + self._held_count / self._model.sample_rate

    def put(self, part: Array, ended: bool = False) -> None:
        """Takes samples [n] or codes [F, codebooks], and whether the clip ends with them."""
        if not self._open_clip and (len(part) or ended):
            self._clips.append(asyncio.get_running_loop().time())
            self._open_clip = True
        if self._unit > 1:
            part = self._whole_frames(part, ended)
        if len(part) or ended:
            self._frames += -(-len(part) // self._unit)
            worker, lane = self.lanes[0]
            worker.put([(lane, part, ended)])
        if ended:
            self._open_clip = False

    def _whole_frames(self, part: Array, everything: bool) -> Array:
        """What can be worked on: messages of few samples would otherwise cost a wake-up and an array each."""
        if len(part):
            self._held.append(part)
            self._held_count += len(part)
        if not everything and self._held_count < self._unit:
            if len(self._held) > 64:
                self._held = [np.concatenate(self._held)]
            return part[:0]
        whole = np.concatenate([part[:0], *self._held])
        count = len(whole) if everything else len(whole) - len(whole) % self._unit
        self._held, self._held_count = [whole[count:]], len(whole) - count
        return whole[:count]

    async def room(self) -> None:
        """Waits until the client may send more."""
        while (
            self.in_s > self.hello.ahead_s
            or self.out_s > self.hello.ahead_s
            or len(self._clips) > _MOST_CLIPS
            or self._out_bytes > _MOST_OUT_BYTES
        ):
            await self._wait()

    async def drained(self) -> None:
        """Waits until everything that was taken in has left, but for a frame that has not come whole."""
        while self._frames or self._out or len(self._clips) > self._open_clip:
            await self._wait()

    async def _wait(self) -> None:
        if self._failure is not None:
            raise self._failure
        self._changed.clear()
        await self._changed.wait()

    # Out ------------------------------------------------------------------------------------------------------------

    def say(self, message: dict[str, Any]) -> None:
        """Queues a text message."""
        self._queue(json.dumps(message), 0.0)

    async def next(self) -> bytes | str:
        """The next message to send."""
        while not self._out:
            await self._wait()
        return self._out[0][0]

    def sent(self) -> None:
        """The message that `next` gave has left."""
        data, seconds = self._out.popleft()
        self._out_bytes -= len(data)
        self.out_s = self.out_s - seconds if self._out else 0.0
        self._pause()
        self._changed.set()

    def deliver(self, result: Result) -> None:
        """Takes what a worker has made."""
        if self.closed:
            return
        if result.failure is not None:
            self._failure = Drop("internal", result.failure)
            self._changed.set()
            return
        self._frames -= result.frames
        codes = audio = None
        if self.hello.task == "encode":
            codes = result.found
        else:
            audio = result.found
            codes = result.given if self.hello.task == "roundtrip" else None
        seconds = result.frames * self._model.frame_s
        if codes is not None and len(codes):
            self._queue(codes_message(codes[:, : self.hello.codebooks]), 0.0 if audio is not None else seconds)
        if audio is not None and (len(audio) or result.frames):
            self._queue(pcm_message(audio), seconds)
            self._sent_samples += len(audio)
        self._sent_frames += result.frames
        first = codes if self.hello.task == "encode" else audio
        if not self._heard and first is not None and len(first):
            self._heard = True
            waited_s = asyncio.get_running_loop().time() - self._clips[0]
            self._metrics.first_s.labels(self.hello.task).observe(waited_s)
        if result.ended:
            self.say({"type": "flushed", "frames": self._sent_frames, "samples": self._sent_samples})
            self._sent_frames = self._sent_samples = 0
            self._heard = False
            self._clips.popleft()
        self._pause()

    def _queue(self, data: bytes | str, seconds: float) -> None:
        self._out.append((data, seconds))
        self._out_bytes += len(data)
        self.out_s += seconds
        self._changed.set()

    def _pause(self) -> None:
        """Lets the model rest while the client does not read."""
        limit = self.hello.ahead_s / 2 if self._paused else self.hello.ahead_s
        if (self.out_s > limit) != self._paused:
            self._paused = not self._paused
            worker, lane = self.lanes[0]
            worker.pause(lane, self._paused)


class Streams:
    """All streams, and the workers behind them.

    Args:
        encoder, decoder: stages of as many slots as there may be streams.
        model: what is served.
        most: streams at a time.
    """

    def __init__(self, encoder: EncodeStage | None, decoder: DecodeStage, model: ModelInfo, most: int) -> None:
        self._model, self._most = model, most
        self.open_ones: set[Stream] = set()
        self._numbers = itertools.count(1)
        directions = ("encode", "decode") if encoder is not None else ("decode",)
        self.metrics = Metrics(directions, self._count, self._queued_s)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._decoder = Worker(decoder, most, model.frame_s, self._deliver, self._observer("decode"))
        self._encoder: Worker | None = None
        if encoder is not None:
            self._encoder = Worker(encoder, most, model.frame_s, self._encoded, self._observer("encode"))
        self._workers = [worker for worker in (self._encoder, self._decoder) if worker is not None]

    def start(self) -> None:
        """Begins, on the running event loop."""
        self._loop = asyncio.get_running_loop()
        for worker in self._workers:
            worker.start()

    def stop(self) -> None:
        """Ends the workers."""
        for worker in self._workers:
            worker.stop()

    def open(self, hello: Hello) -> Stream:
        """Makes a stream.

        Raises:
            Drop: full.
        """
        if len(self.open_ones) >= self._most:
            those = "the one stream is" if self._most == 1 else f"all {self._most} streams are"
            raise Drop("full", f"{those} taken, try again later")
        lanes = []
        if hello.task != "decode":
            assert self._encoder is not None
            lanes.append((self._encoder, self._encoder.open(None, hello.codebooks)))
        if hello.task != "encode":
            lanes.append((self._decoder, self._decoder.open(None, hello.codebooks)))
        taken = [(worker, lane) for worker, lane in lanes if lane is not None]
        assert len(taken) == len(lanes), "each worker has a slot for every stream"
        stream = Stream(next(self._numbers), hello, self._model, taken, self.metrics)
        for _, lane in taken:
            lane.owner = stream
        self.open_ones.add(stream)
        self.metrics.opened.labels(hello.task).inc()
        return stream

    def close(self, stream: Stream) -> None:
        """Frees a stream's slots."""
        stream.closed = True
        self.open_ones.discard(stream)
        for worker, lane in stream.lanes:
            worker.close(lane)

    # In a worker's thread -------------------------------------------------------------------------------------------

    def _encoded(self, results: Sequence[Result]) -> None:
        onward, out = [], []
        for result in results:
            stream: Stream = result.lane.owner
            if result.failure is not None or len(stream.lanes) == 1:
                out.append(result)
            else:
                codes = result.found
                assert codes is not None or result.ended
                part = np.zeros((0, stream.hello.codebooks), np.int64) if codes is None else codes
                onward.append((stream.lanes[1][1], part[:, : stream.hello.codebooks], result.ended))
        if onward:
            self._decoder.put(onward)
        if out:
            self._deliver(out)

    def _deliver(self, results: Sequence[Result]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(_hand_over, results)

    def _observer(self, direction: str) -> Any:
        def observe(slots: int, frames: int, seconds: float) -> None:
            self.metrics.stepped(direction, slots, frames, self._model.frame_s, seconds)

        return observe

    # For the metrics ------------------------------------------------------------------------------------------------

    def _count(self, task: str) -> float:
        return float(sum(stream.hello.task == task for stream in self.open_ones))

    def _queued_s(self, queue: str) -> float:
        return sum(stream.in_s if queue == "in" else stream.out_s for stream in self.open_ones)


def _hand_over(results: Sequence[Result]) -> None:
    for result in results:
        stream: Stream = result.lane.owner
        stream.deliver(result)
