"""What the ops share: the choice of a backend, and gradients that recompute through the reference."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import build
from ..errors import BackendError

logger = logging.getLogger("dualcodec_ext")

BACKENDS = ("auto", "cpu", "cuda", "triton", "reference")
FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_asked: contextvars.ContextVar[str | None] = contextvars.ContextVar("dualcodec_ext_backend", default=None)


class _Traced:
    """The backend that torch.compile sees: it can't read a context variable, but guards on a plain attribute."""

    name: str | None = None


_traced = _Traced()
_told: set[str] = set()


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise BackendError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def _from_environment() -> str:
    return _check_name(os.environ.get("DUALCODEC_EXT_BACKEND") or "auto", "DUALCODEC_EXT_BACKEND")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops, and models on them, on one backend inside a `with` block.

    Args:
        name: "auto" (the best that can run), "cpu", "cuda", "triton", or "reference" (plain PyTorch).
            `DUALCODEC_EXT_BACKEND` does the same for a whole process.

    Raises:
        BackendError: no such backend, or one asked for by name that cannot run here; the reason is given.

    The choice belongs to the current thread or task; code under `torch.compile` sees the one made last in the process.
    """
    _check_name(name, "backend")
    reason = unavailable(name)
    if reason:
        raise BackendError(f"backend {name!r} can't run here: {reason}")
    token, before = _asked.set(name), _traced.name
    _traced.name = name
    try:
        yield
    finally:
        _traced.name = before
        _asked.reset(token)


def unavailable(name: str) -> str:
    """Return why a backend can't run on this machine, in one line; empty when it can."""
    if name in ("auto", "reference"):
        return ""
    if name == "cpu":
        return build.unavailable_reason() or ""
    return f"this version has no {name} kernels"


def asked_backend() -> str:
    """Return the backend asked for: by `backend`, else by DUALCODEC_EXT_BACKEND, else "auto"."""
    if torch.compiler.is_compiling():
        return _traced.name or "auto"
    return _asked.get() or _from_environment()


def _tell_once(level: int, message: str) -> None:
    if message not in _told:
        _told.add(message)
        logger.log(level, message)


def choose_backend(device: torch.device, dtype: torch.dtype) -> str:
    """Return "cpu" or "reference", whichever is to run an op on tensors of this device and dtype.

    The compiled ops refuse a dtype that they lack themselves, in one line.

    Raises:
        BackendError: the backend asked for by name lacks the device or the dtype, or can't run here.
    """
    name = asked_backend()
    if name == "reference":
        return name
    if torch.compiler.is_compiling():
        return "cpu" if device.type == "cpu" and _loaded else "reference"
    if name != "auto":
        reason = unavailable(name)
        if reason:
            raise BackendError(f"backend {name!r} can't run here: {reason}")
        if device.type != name:
            raise BackendError(f"backend {name!r} needs tensors on {name}, got {device}")
        if dtype not in FLOAT_DTYPES:
            raise BackendError(f"backend {name!r} has no kernels for {dtype}")
        return name
    if device.type != "cpu":
        _tell_once(logging.WARNING, f"no kernels for {device.type} in this version: the reference runs there")
        return "reference"
    reason = unavailable("cpu")
    if reason:
        _tell_once(logging.WARNING, f"the slow reference runs, because the compiled module can't: {reason}")
        return "reference"
    _tell_once(logging.INFO, "backend cpu is used")
    return "cpu"


def load_schemas() -> bool:
    """Load the compiled module if there is one; return whether `torch.ops.dualcodec_ext` exists."""
    return build.load_module() is not None


_loaded = load_schemas()


def register(
    name: str,
    fake: Callable[..., Any],
    reference_call: Callable[..., Tensor] | None,
    tensors: Sequence[int],
    packed: int | None = None,
) -> None:
    """Register an op's fake and its gradient with torch, where the compiled module has brought its schema.

    Args:
        name: of the op.
        fake: computes the outputs' shapes, dtypes and strides.
        reference_call: the same arguments through plain PyTorch; None: the op refuses gradients.
        tensors: positions of the arguments that may need a gradient.
        packed: position of the packed weight.
    """
    if not _loaded:
        return
    qualified = f"dualcodec_ext::{name}"
    torch.library.register_fake(qualified, fake)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if reference_call is None:
            return
        if packed is not None and inputs[packed] is not None:
            if any(ctx.needs_input_grad[i] for i in tensors if i != 0 and isinstance(inputs[i], Tensor)):
                raise RuntimeError(f"{name}: packed must be None when a weight needs a gradient, got a packed weight")
            if ctx.needs_input_grad[0]:
                raise RuntimeError(f"{name}: packed must be None when the input needs a gradient, got a packed weight")
        ctx.save_for_backward(*[inputs[i] if isinstance(inputs[i], Tensor) else None for i in range(len(inputs))])
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]

    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if reference_call is None:
            raise RuntimeError(f"{name}: has no gradient; train through backend('reference')")
        args = [t if t is not None else o for t, o in zip(ctx.saved_tensors, ctx.others, strict=True)]
        wanted = [i for i in tensors if ctx.needs_input_grad[i]]
        with torch.enable_grad():
            for i in wanted:
                args[i] = args[i].detach().requires_grad_()
            y = reference_call(*args)
            found = torch.autograd.grad(y, [args[i] for i in wanted], grads[0], allow_unused=True)
        result: list[Any] = [None] * len(args)
        for i, grad in zip(wanted, found, strict=True):
            result[i] = torch.zeros_like(args[i]) if grad is None else grad
        return tuple(result)

    torch.library.register_autograd(qualified, backward, setup_context=setup_context)


def empty_signal(like: Tensor, channels: int, steps: Any) -> Tensor:
    """Return an empty [B, channels, steps] in the layout of `like`, for fakes."""
    batch = like.shape[0]
    if like.stride(1) == 1:
        return like.new_empty(batch, steps, channels).transpose(1, 2)
    return like.new_empty(batch, channels, steps)


def conv_steps(steps: Any, taps: int, stride: int, dilation: int, padding: Sequence[int]) -> Any:
    """Return the output steps of a convolution, for fakes; symbolic steps give symbolic ones."""
    span = steps + padding[0] + padding[1] - dilation * (taps - 1) - 1
    if isinstance(steps, int):
        return 0 if steps <= 0 or span < 0 else span // stride + 1
    return span // stride + 1


def check_pair(op: str, padding: Sequence[int]) -> list[int]:
    """Return padding as a list; raise one line unless it is two integers."""
    try:
        left, right = (int(p) for p in padding)
    except (TypeError, ValueError):
        raise ValueError(f"{op}: padding must be two integers (left, right), got {padding!r}") from None
    return [left, right]
