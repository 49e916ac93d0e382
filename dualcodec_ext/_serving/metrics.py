"""What the server counts, in a registry of its own; `GET /metrics` gives it in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .protocol import CLOSE_CODES, TASKS

_SECONDS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)
_FIRST_SECONDS = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
_SLOTS = (1, 2, 4, 8, 12, 16, 24, 32, 64, 128)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """The server's counters.

    Args:
        directions: encode, decode, as far as the model has them.
        streams: counts the streams of a task that are open now.
        queued_s: sums up the seconds of audio that wait in the queues, `in` or `out`.
    """

    def __init__(
        self, directions: tuple[str, ...], streams: Callable[[str], float], queued_s: Callable[[str], float]
    ) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"dualcodec_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"dualcodec_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, label: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"dualcodec_{name}", text, [label], buckets=buckets, registry=self.registry)

        self.opened = counter("streams", "Streams that were accepted", "task")
        self.refused = counter("refused", "Streams that were refused before they began", "reason")
        self.dropped = counter("dropped", "Streams that the server ended", "reason")
        self.frames = counter("frames", "Frames that were stepped", "direction")
        self.audio_s = counter("audio_seconds", "Seconds of audio of those frames", "direction")
        self.pass_s = histogram("step_seconds", "Seconds of one step of some slots", "direction", _SECONDS)
        self.pass_slots = histogram("step_slots", "Slots that stepped together", "direction", _SLOTS)
        self.first_s = histogram(
            "time_to_first_audio_seconds",
            "From a clip's first data in to its first result out (codes for the task encode)",
            "task",
            _FIRST_SECONDS,
        )
        now = gauge("streams_now", "Streams that are open", "task")
        queued = gauge("queue_seconds", "Seconds of audio that wait, of all streams", "queue")
        factor = gauge("real_time_factor", "Seconds of audio per second of stepping, since the start", "direction")
        # A series that exists from the start can be alerted on before its first event.
        for task in TASKS:
            self.opened.labels(task)
            now.labels(task).set_function(lambda task=task: streams(task))
        for reason in CLOSE_CODES:
            self.refused.labels(reason)
            self.dropped.labels(reason)
        for name in ("in", "out"):
            queued.labels(name).set_function(lambda name=name: queued_s(name))
        self._sums = {direction: [0.0, 0.0] for direction in directions}
        for direction, sums in self._sums.items():
            factor.labels(direction).set_function(lambda sums=sums: sums[0] / sums[1] if sums[1] else 0.0)

    def stepped(self, direction: str, slots: int, frames: int, frame_s: float, seconds: float) -> None:
        """Counts one step of `slots` slots by `frames` frames each."""
        audio_s = slots * frames * frame_s
        self.frames.labels(direction).inc(slots * frames)
        self.audio_s.labels(direction).inc(audio_s)
        self.pass_s.labels(direction).observe(seconds)
        self.pass_slots.labels(direction).observe(slots)
        self._sums[direction][0] += audio_s
        self._sums[direction][1] += seconds

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)
