"""The cases that the ops are tried with on a GPU: those of their own test files, and sizes beyond one tile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import test_causal_dwconv1d as dwconv
import test_residual_unit as unit
import test_rvq_lookup as lookup
import test_rvq_search as search
import test_snake_conv1d as conv
import test_snake_upsample1d as upsample
import torch
from gpu import DEVICE
from opsuite import Case
from torch import Tensor

from dualcodec_ext import ops, reference

MODULES = {
    "causal_dwconv1d": dwconv,
    "residual_unit": unit,
    "rvq_lookup": lookup,
    "rvq_search": search,
    "snake_conv1d": conv,
    "snake_upsample1d": upsample,
}
SIGNAL_OPS = ("causal_dwconv1d", "residual_unit", "snake_conv1d", "snake_upsample1d")
CASE_OPS = (*SIGNAL_OPS, "rvq_lookup")


def lookup_case(**shape: Any) -> Case:
    """rvq_lookup with the addend as the signal."""
    codes, weights, addend = lookup.make(**shape)

    def rvq_lookup(x: Tensor, *, codes: Tensor, function: Any = ops.rvq_lookup, **others: Any) -> Tensor:
        return function(codes[..., : x.shape[-1]], addend=x, **others)

    def plain(x: Tensor, **others: Any) -> Tensor:
        return rvq_lookup(x, function=reference.rvq_lookup_ref, **others)

    return Case(rvq_lookup, plain, addend, dict(weights), {"codes": codes})


BUILDERS: dict[str, Callable[..., Case]] = {
    "causal_dwconv1d": dwconv.case,
    "residual_unit": unit.case,
    "rvq_lookup": lookup_case,
    "snake_conv1d": conv.case,
    "snake_upsample1d": upsample.case,
}
# Several tiles and a tail in every dimension.
TYPICAL: dict[str, dict[str, Any]] = {
    "causal_dwconv1d": {"channels": 200, "steps": 330},
    "residual_unit": {"channels": 96, "steps": 330, "dilation": 3},
    "rvq_lookup": {"channels": 200, "frames": 330, "stages": 7},
    "snake_conv1d": {"cin": 72, "cout": 200, "taps": 7, "steps": 330, "padding": (3, 3)},
    "snake_upsample1d": {"cin": 96, "cout": 72, "stride": 4, "steps": 150},
}
STEPS = {op: "frames" if op == "rvq_lookup" else "steps" for op in BUILDERS}


def typical(op: str, steps: int | None = None, **changes: Any) -> Case:
    length = {} if steps is None else {STEPS[op]: steps}
    return BUILDERS[op](**{**TYPICAL[op], **length, **changes}).to(DEVICE)


def in_dtype(case: Case, dtype: torch.dtype) -> Case:
    weights = {k: None if v is None else v.to(dtype) for k, v in case.weights.items()}
    return replace(case, x=case.x.to(dtype), weights=weights)
