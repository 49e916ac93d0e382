"""Memory that calls use one after the other: taken by one, given back, taken by the next."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

# Of idle workspaces, for each engine and kind of call. A 12hz_v1 decoder takes up to 59 MiB for clips of up to 128
# frames and 95 MiB for longer ones, its encoders 48 and 88.
KEPT_BYTES = 104 * 2**20


class _Workspace(Protocol):
    batch: int
    frames: int

    def bytes(self) -> int: ...


Workspace = TypeVar("Workspace", bound=_Workspace)


class Pool(Generic[Workspace]):
    """Idle workspaces. A call takes one or makes one, and gives it back: calls on several threads never share one.

    Args:
        make: (batch, frames) to a workspace.
        cap_bytes: memory of the idle ones; those given back longest ago go first.
    """

    def __init__(self, make: Callable[[int, int], Workspace], cap_bytes: int = KEPT_BYTES) -> None:
        self._make, self._cap_bytes = make, cap_bytes
        self._idle: list[Workspace] = []
        self._lock = threading.Lock()

    def held_bytes(self) -> int:
        return sum(workspace.bytes() for workspace in self._idle)

    def take(self, batch: int, frames: int) -> Workspace:
        frames = min(1 << (frames - 1).bit_length(), 1 << 14)  # a few sizes; past the last one tiles are full
        with self._lock:
            fits = [w for w in self._idle if w.batch == batch and w.frames >= frames]
            if fits:
                best = min(fits, key=lambda w: w.frames)
                self._idle.remove(best)
                return best
        return self._make(batch, frames)

    def give(self, workspace: Workspace) -> None:
        with self._lock:
            self._idle.append(workspace)
            while self._idle and self.held_bytes() > self._cap_bytes:
                self._idle.pop(0)
