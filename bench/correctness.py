"""Errors against float64, and the verdict that comes before any timing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dualcodec_ext.testing import one_ulp

# A peer is a peer as long as it computes the same function: its own rounding is its own business. Far outside
# these # the graph was built wrongly. [relative RMS error]
PEER_RMS_LIMIT = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}
# Below this agreement of codes the encoder is another one. bf16 features and latents move many codes of the
# late # stages, whose residuals are small; each of them starts from what is left, so nothing is asserted
# there.
PEER_CODE_AGREEMENT = {torch.float64: 0.999, torch.float32: 0.9, torch.float16: 0.0, torch.bfloat16: 0.0}
FAST_MAX_LIMIT = 1e-4  # of full scale, for the Winograd decoder


@dataclass(frozen=True)
class Verdict:
    ok: bool
    text: str  # one table cell
    numbers: Mapping[str, Any] = field(default_factory=dict)


@contextmanager
def exact_math() -> Iterator[None]:
    """Float32 means float32: what is right must not hang on a GPU library's TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def as_tensor(x: object) -> Tensor:
    return x if isinstance(x, Tensor) else torch.as_tensor(x)


@dataclass(frozen=True)
class Error:
    """Of an output against float64: absolute, and what to hold it against."""

    largest: float
    rms: float
    largest_value: float
    rms_value: float

    @classmethod
    def of(cls, found: Tensor, wanted: Tensor) -> Error:
        difference = found.detach().to("cpu", torch.float64) - wanted
        pair = [(x.abs().max().item(), x.pow(2).mean().sqrt().item()) for x in (difference, wanted)]
        return cls(*pair[0], *pair[1])

    @property
    def relative(self) -> tuple[float, float]:
        return self.largest / (self.largest_value or 1.0), self.rms / (self.rms_value or 1.0)

    def text(self) -> str:
        return "{:.1e} {:.1e}".format(*self.relative)


Spans = tuple[tuple[int, int], ...] | None  # steps that are compared, None: all


def cut(x: Tensor, spans: Spans) -> Tensor:
    return x if spans is None else torch.cat([x[..., start:stop] for start, stop in spans], -1)


Items = tuple[int, ...] | None  # of the batch that are compared, None: all


def pick(x: Tensor, items: Items) -> Tensor:
    return x if items is None else x[list(items)]


@dataclass(frozen=True)
class WaveCheck:
    """A tensor of samples or latents against float64, ours by the error of plain PyTorch in the same
    dtype."""

    wanted: Tensor  # float64, on the CPU, its spans one behind the other
    plain: Error | None = None  # what ours is held to: at most twice it
    spans: Spans = None
    length: int | None = None  # of the whole output, where spans cover less
    items: Items = None
    batch: int | None = None  # of the whole output, where items cover less

    def __call__(self, output: object, dtype: torch.dtype, *, ours: bool = False, fast: bool = False) -> Verdict:
        found = as_tensor(output)
        batch, *middle, last = self.wanted.shape
        shape = (self.batch or batch, *middle, self.length or last)
        if found.shape != shape:
            return Verdict(False, f"shape {list(found.shape)}, not {list(shape)}")
        found = cut(pick(found, self.items), self.spans)
        if not torch.isfinite(found).all():
            return Verdict(False, "not finite")
        error = Error.of(found, self.wanted)
        numbers = {"max": error.relative[0], "rms": error.relative[1]}
        if ours and fast:
            ok = error.largest <= FAST_MAX_LIMIT
        elif ours and self.plain is not None:
            # Few outputs make the two largest errors a draw.
            floor = one_ulp(error.largest_value, dtype) * (1 if found.numel() >= 100_000 else 8)
            ok = error.largest <= max(2 * self.plain.largest, floor) and error.rms <= max(2 * self.plain.rms, floor)
            numbers |= {"plain_max": self.plain.relative[0], "plain_rms": self.plain.relative[1]}
        else:
            ok = error.relative[1] <= PEER_RMS_LIMIT[dtype]
        return Verdict(ok, error.text(), numbers)


@dataclass(frozen=True)
class CodesCheck:
    """Codes against float64's. A code may differ where float64's own margin is below its bound; what hangs on
    such a frame is then no longer comparable, and is excused."""

    wanted: tuple[Tensor, ...]  # [B, q, F] per part, in the order they are computed
    margins: tuple[Tensor, ...]
    bounds: tuple[Tensor, ...]
    reach: tuple[int, int] = (
        0,
        0,
    )  # frames before and after a changed code of a part that the next parts may see
    spans: Spans = None
    frames: int | None = None  # of the whole output, where spans cover less
    items: Items = None
    batch: int | None = None  # of the whole output, where items cover less

    def __call__(self, output: object, dtype: torch.dtype, *, ours: bool = False, fast: bool = False) -> Verdict:
        parts = [as_tensor(x).cpu() for x in (output if isinstance(output, tuple | list) else (output,))]
        shapes = [[self.batch or w.shape[0], *w.shape[1:-1], self.frames or w.shape[-1]] for w in self.wanted]
        if [list(p.shape) for p in parts] != shapes:
            return Verdict(False, f"shapes {[list(p.shape) for p in parts]}, not {shapes}")
        parts = [cut(pick(p, self.items), self.spans) for p in parts]
        excused = torch.zeros_like(self.wanted[0][:, 0], dtype=torch.bool)  # [B, F]
        wrong = ties = same = total = 0
        for found, wanted, margin, bound in zip(parts, self.wanted, self.margins, self.bounds, strict=True):
            changed_here = torch.zeros_like(excused)
            for stage in range(wanted.shape[1]):
                differs = found[:, stage] != wanted[:, stage]
                same += int((~differs).sum())
                total += differs.numel()
                fresh = differs & ~excused & ~changed_here
                close = margin[:, stage] < bound[:, stage]
                ties += int((fresh & close).sum())
                wrong += int((fresh & ~close).sum())
                changed_here |= differs
            excused |= self._spread(changed_here)
        agreement = same / max(total, 1)
        numbers = {"agreement": agreement, "near_ties": ties, "wrong": wrong}
        exact = ours and dtype in (torch.float32, torch.float64)
        ok = wrong == 0 if exact else agreement >= PEER_CODE_AGREEMENT[dtype]
        note = f" ({ties} ties)" if ties else ""
        return Verdict(
            ok,
            f"{100 * agreement:.2f}% same{note}" + (f", {wrong} wrong" if exact and wrong else ""),
            numbers,
        )

    def _spread(self, changed: Tensor) -> Tensor:
        before, after = self.reach
        padded = torch.nn.functional.pad(changed.float()[:, None], (after, before))
        return torch.nn.functional.max_pool1d(padded, before + after + 1, 1)[:, 0] > 0
