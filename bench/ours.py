"""Our side of decode and encode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

import dualcodec_ext as dx
from dualcodec_ext import build

from .peers.base import Call, Task, Unavailable, with_state


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


@contextlib.contextmanager
def unrecorded(model: dx.DualCodec) -> Iterator[None]:
    """Run a prepared model without CUDA graphs."""
    assert model._engine_state is not None
    graphs = model._engine_state[1]
    cap, graphs.cap_bytes = graphs.cap_bytes, 0
    try:
        yield
    finally:
        graphs.cap_bytes = cap


class CodecCall:
    """A call of the drop-in. On a GPU the first call of a shape runs eagerly, the second records, later ones replay."""

    def __init__(self, model: dx.DualCodec, task: Task, dtype: torch.dtype) -> None:
        self.model, self.decode, self.family = model, task.kind == "decode", task.family or task.device
        self.inputs = task.cast_inputs(dtype)

    def __call__(self) -> object:
        # By name, so that a kernel that can't run raises; "auto" would fall back.
        with torch.inference_mode(), dx.backend(self.family):
            if self.decode:
                return self.model.decode_from_codes(*self.inputs)
            return self.model.encode(self.inputs[0], semantic_repr=self.inputs[1])

    def eager(self) -> object:
        """The same without a recording, whose memory would not be seen as this call's."""
        with unrecorded(self.model):
            return self()


def codec_call(task: Task, dtype: torch.dtype, *, fast: bool) -> Call:
    """The drop-in on a reference model's parameters."""
    require_module()
    source = with_state(lambda: dx.reference.DualCodec(**task.settings), task.state).to(task.device)
    try:
        model = dx.accelerate(source, dtype=dtype, fast=fast)
    except dx.DualCodecError as error:
        if fast:
            raise Unavailable(" ".join(str(error).split())) from None
        raise
    call = CodecCall(model, task, dtype)
    with dx.backend(call.family):
        model.prepare()
    if model._engine_state is None:
        raise Unavailable("the engine can't run here: dx.doctor() says why")
    return call
