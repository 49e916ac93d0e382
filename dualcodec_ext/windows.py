"""Features of long clips from windows that overlap, for models that attend over the whole of what they are given."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .errors import DualCodecError

WINDOW_S, OVERLAP_S = 30.0, 5.0
WHOLE_S = 60.0


class FeatureWindows:
    """Features as the audio comes: an approximation of those of the whole clip.

    A window of `window_s` begins every `window_s - overlap_s`, in whole frames, and is computed as a clip of its own.
    Where two windows overlap, each gives the half that lies further from its edge.

    Args:
        compute: turns [1, 1, S] into [1, C, F], F up to a few less than S / frame_samples.
        frame_samples: samples per frame.
        rate_hz: of the audio.
        window_s: length of a window.
        overlap_s: of two windows, less than half of one; rounded up to whole frames, at least three.
        whole_s: audio of up to this length is computed whole.

    Raises:
        DualCodecError: a window that is not longer than twice its overlap.
    """

    def __init__(
        self,
        compute: Callable[[Tensor], Tensor],
        frame_samples: int,
        rate_hz: int,
        window_s: float = WINDOW_S,
        overlap_s: float = OVERLAP_S,
        whole_s: float = WHOLE_S,
    ) -> None:
        self._compute, self._frame_samples = compute, frame_samples
        self._window = math.floor(window_s * rate_hz / frame_samples)
        overlap = max(3, math.ceil(overlap_s * rate_hz / frame_samples))
        self._whole_samples = whole_s * rate_hz
        if overlap_s < 0 or 2 * overlap >= self._window:
            raise DualCodecError(
                "features: window_s must be longer than twice overlap_s, and neither negative, got"
                f" {window_s:g} and {overlap_s:g}"
            )
        self._step, self._lead = self._window - overlap, overlap // 2
        self._held = torch.zeros(1, 1, 0)  # from the next window's first sample on
        self._given = self._first = 0  # frames given, and the next window's first one

    def write(self, audio: Tensor) -> Tensor:
        """Take in [1, 1, n], and return the features [1, C, k] that can be known by now."""
        self._held = torch.cat([self._held, audio], -1)
        if not self._given and self._held.shape[-1] <= self._whole_samples:
            return self._none()
        parts = []
        samples = self._window * self._frame_samples
        while self._held.shape[-1] > samples:  # not the last window
            features = self._compute(self._held[..., :samples])
            end = self._first + self._lead + self._step
            parts.append(features[..., self._given - self._first : end - self._first])
            self._given, self._first = end, self._first + self._step
            self._held = self._held[..., self._step * self._frame_samples :].clone()
        return torch.cat(parts, -1) if parts else self._none()

    def finish(self) -> Tensor:
        """Return the rest."""
        return self._compute(self._held)[..., self._given - self._first :]

    def _none(self) -> Tensor:
        return self._compute(self._held[..., :0])
