"""Our side of decode and encode."""

from __future__ import annotations

import torch

import dualcodec_ext as dx
from dualcodec_ext import build

from .peers.base import Call, Task, Unavailable


def missing_module() -> str:
    """Why the compiled module can't be used, on one line; empty where it can."""
    if build.load_module() is not None:
        return ""
    return " ".join(build.unavailable_reason().split())


def require_module() -> None:
    """Raise Unavailable where there is no compiled module: the reference must never be timed under our
    name."""
    if missing := missing_module():
        raise Unavailable(f"no compiled module: {missing}")


def codec_call(task: Task, dtype: torch.dtype, *, fast: bool) -> Call:
    """The drop-in on a reference model's parameters."""
    require_module()
    source = dx.reference.DualCodec(**task.settings)
    source.load_state_dict(task.state)
    source = source.to(task.device).eval()
    try:
        model = dx.accelerate(source, dtype=dtype, fast=fast)
    except dx.DualCodecError as error:
        if fast:
            raise Unavailable(" ".join(str(error).split())) from None
        raise
    first, second = task.cast_inputs(dtype)

    def call() -> object:
        # By name, so that a kernel that can't run raises; "auto" would fall back.
        with torch.inference_mode(), dx.backend(task.device):
            if task.kind == "decode":
                return model.decode_from_codes(first, second)
            return model.encode(first, semantic_repr=second)

    return call
