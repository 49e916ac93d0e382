"""Codes on their way into a recording, and the answer whether all are in range: it is there before the recording has
run, so that a call need not wait for its audio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class CodeInput:
    """Where a recording reads codes, and how many entries their codebooks have.

    Args:
        to: [B, q, W] int64.
        entries: of each codebook.
    """

    to: Tensor
    entries: int


class CodeLook:
    """Brings the codes of one call at a time into a recording's inputs, and looks at them.

    Args:
        device: of the recording.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        with torch.inference_mode(False):
            self._wrong = torch.zeros(1, dtype=torch.int64, pin_memory=self._event is not None)

    def take(self, inputs: Sequence[CodeInput], codes: Sequence[Tensor]) -> None:
        """Copy codes [B, q, F], F up to W, to where they are read.

        Args:
            inputs: one or two.
            codes: for each, of any device and integer type.
        """
        self._wrong.zero_()
        codes = [c.to(self._device) for c in codes]
        if self._event is None:
            for given, c in zip(inputs, codes, strict=True):
                given.to[..., : c.shape[-1]].copy_(c)
                self._wrong |= ((c < 0) | (c >= given.entries)).any()
            return
        parts: list[Any] = [x for given, c in zip(inputs, codes, strict=True) for x in (given.to, c, given.entries)]
        torch.ops.dualcodec_ext.take_codes(*(parts if len(inputs) == 2 else [*parts, None, None, 0]), self._wrong)
        self._event.record()

    def fine(self) -> bool:
        """Return whether all codes of the last `take` are in range; waits for it, and for nothing that came behind."""
        if self._event is not None:
            self._event.synchronize()
        return not self._wrong.item()
