"""Timing of single ops on a GPU: calls recorded in a CUDA graph, so that what is timed is their kernels and not Python
starting them one by one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .timing import Call

_SPAN_S = 0.004  # of a sample: waiting for the GPU at its end takes some microseconds
_MOST = 500  # calls in a graph


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def record(call: Call, count: int) -> Call:
    """`count` calls as one CUDA graph; returns its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # what a first call on a stream sets up may not happen inside a recording
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    return graph.replay


@dataclass(frozen=True)
class Repeated:
    """`calls` calls behind each other, finished when it returns."""

    run: Call
    replays: int
    calls: int
    device: str
    graph: bool
    call: Call  # a recording reads its tensors, and does not hold them

    def __call__(self) -> None:
        for _ in range(self.replays):
            self.run()
        synchronize(self.device)

    @property
    def how(self) -> str:
        return f"{self.calls} calls, {'in a CUDA graph' if self.graph else 'one by one'}"


def _seconds(call: Call, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return max(time.perf_counter() - start, 1e-7)


def repeated(call: Call, device: str, recorder: Callable[[Call, int], Call] = record) -> Repeated:
    """Repeat a call until it lasts about 4 ms, from a recording where it can be recorded.

    Args:
        call: starts work on the device and need not wait for it.
        device: "cuda"; "cpu" with a recorder of its own.
        recorder: makes one call of many.
    """
    for _ in range(3):
        call()
    count = min(_MOST, int(_SPAN_S / _seconds(call, device)) + 1)
    try:
        run, graph = recorder(call, count), True
    except RuntimeError:  # something in it can't be recorded, such as waiting for a result
        run, graph, count = call, False, 1
    run()
    replays = min(10_000, int(_SPAN_S / _seconds(run, device)) + 1)
    return Repeated(run, replays, count * replays, device, graph, call)
