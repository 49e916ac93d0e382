"""What the ops share: the choice of a backend, and gradients that recompute through the reference."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import build
from ..errors import BackendError, DualCodecError
from . import _choice, _library

logger = logging.getLogger("dualcodec_ext")

BACKENDS = ("auto", "cpu", "cuda", "triton", "reference")
_asked: contextvars.ContextVar[str] = contextvars.ContextVar("dualcodec_ext_backend")


class _Scope:
    """The backend asked for, as an attribute.

    torch.compile can't trace ContextVar.get, but takes a property whose getter is a C function for a plain
    attribute: it reads it when tracing and guards on it at every call, so that traced code follows the context too.
    The getter gets the scope itself as its default, and returns that where nothing was asked for.
    """

    name = property(_asked.get)


_scope = _Scope()
_told: set[str] = set()


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise BackendError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops, and models on them, on one backend inside a `with` block.

    Args:
        name: "auto" (the best that can run), "cpu", "cuda", "triton", or "reference" (plain PyTorch).
            `DUALCODEC_EXT_BACKEND` does the same for a whole process. "triton" takes CUDA tensors, and with
            TRITON_INTERPRET=1 in the environment before triton is imported CPU tensors too, slowly.

    Raises:
        BackendError: no such backend, or one asked for by name that cannot run here; the reason is given.

    The choice belongs to the current thread or task. Code under `torch.compile` follows it, traced once per choice; the
    block itself must stand outside of such code.
    """
    _check_name(name, "backend")
    reason = unavailable(name)
    if reason:
        raise BackendError(f"backend {name!r} can't run here: {reason}")
    token = _asked.set(name)
    try:
        yield
    finally:
        _asked.reset(token)


@functools.cache
def unavailable(name: str) -> str:
    """Return why a backend can't run on this machine, in one line; empty when it can."""
    if name in ("auto", "reference"):
        return ""
    if name == "cpu":
        return build.unavailable_reason()
    return str(build.build_info()["backends"][name])


def _tell_once(level: int, message: str) -> None:
    if message not in _told:
        _told.add(message)
        logger.log(level, message)


def _devices(name: str) -> tuple[str, ...]:
    """Return the kinds of device whose tensors a backend takes."""
    if name == "triton":
        return ("cuda", "cpu") if build.triton_interprets() else ("cuda",)
    return (name,)


def _refusal(name: str, device: torch.device, dtype: torch.dtype, op: str) -> str:
    """Return why a backend can't run an op on such tensors, in one line; empty when it can."""
    reason = unavailable(name)
    if reason:
        return f"backend {name!r} can't run here: {reason}"
    if device.type not in _devices(name):
        return f"backend {name!r} needs tensors on {' or '.join(_devices(name))}, got {device}"
    if name == "triton" and op not in _choice.TRITON_OPS:
        return f"backend 'triton' has no kernel for {op}, only for {', '.join(_choice.TRITON_OPS)}"
    if dtype not in _choice.DTYPES[name]:
        return f"backend {name!r} has no kernels for {dtype}"
    return ""


def _automatic(device: torch.device, dtype: torch.dtype, op: str, steps: int | None) -> str:
    if device.type == "cpu":
        reason = unavailable("cpu")
        if reason:
            _tell_once(logging.WARNING, f"the slow reference runs, because the compiled module can't: {reason}")
            return "reference"
        _tell_once(logging.INFO, "backend cpu is used")
        return "cpu"
    if device.type != "cuda":
        _tell_once(logging.WARNING, f"no kernels for {device.type} in this version: the reference runs there")
        return "reference"
    reasons = []
    for row in _choice.AUTO[op]:
        if row.holds(steps):
            reason = _refusal(row.backend, device, dtype, op)
            if not reason:
                _tell_once(logging.INFO, f"{op}: backend {row.backend} is used on cuda")
                return row.backend
            reasons.append(reason)
    _tell_once(logging.WARNING, f"{op}: the slow reference runs on cuda for {dtype}: {'; '.join(reasons)}")
    return "reference"


def asked_backend() -> str:
    """Return the backend that the context or the environment asks for."""
    name = _scope.name
    return name if isinstance(name, str) else _from_environment()


def _from_environment() -> str:
    return _check_name(os.environ.get("DUALCODEC_EXT_BACKEND") or "auto", "DUALCODEC_EXT_BACKEND")


def _resolve(asked: str | None, device: torch.device, dtype: torch.dtype, op: str, steps: int | None) -> str:
    name = asked or _from_environment()
    if name == "auto":
        return _automatic(device, dtype, op, steps)
    if name != "reference":
        refusal = _refusal(name, device, dtype, op)
        if refusal:
            raise BackendError(refusal)
    return name


# What torch.compiler.assume_constant_result does, without loading torch's compiler at import: the tracer calls
# _resolve as it stands, log lines and errors included, and keeps the answer. It depends on nothing that changes
# without a new trace.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose_backend(device: torch.device, dtype: torch.dtype, op: str, steps: int | None = None) -> str:
    """Return "cpu", "cuda", "triton" or "reference", whichever is to run an op on tensors of this device and dtype.

    Args:
        device: of the tensors.
        dtype: of the signal.
        op: its name, or `_choice.ENGINE` for the inference program as a whole.
        steps: B * T of the call; None: rows of the `auto` table that hold for some sizes alone are passed over.

    Raises:
        BackendError: the backend asked for by name lacks the device, the dtype or the op, or can't run here.
    """
    name = _scope.name
    return _resolve(name if isinstance(name, str) else None, device, dtype, op, steps)


def kernels_for(op: str, like: Tensor, packed: Tensor | None = None, sized: Tensor | None = None) -> Any:
    """Return the namespace of torch.ops whose kernels are to run an op on tensors like `like`; None: the reference.

    `sized` [B, .., T] tells the call's size where `like` does not.

    Raises:
        DualCodecError: the reference is to run, and the weight is packed: the plain one may be a placeholder of the
            same shape.
        BackendError: as `choose_backend`.
    """
    sized = like if sized is None else sized
    steps = sized.shape[0] * sized.shape[-1] if packed is None and _choice.by_size(op) else None
    name = choose_backend(like.device, like.dtype, op, steps)
    if name == "reference":
        if packed is not None:
            raise DualCodecError(f"{op}: packed must be None where the reference runs, got a packed weight")
        return None
    return torch.ops.dualcodec_ext_triton if name == "triton" else torch.ops.dualcodec_ext


def kernels_for_pair(op: str, like: Tensor, packed: Tensor | None) -> Any:
    """As `kernels_for`, for an op's form of two results: the compiled CUDA kernels and the reference have it."""
    kernels = kernels_for(op, like, packed)
    if kernels is torch.ops.dualcodec_ext_triton:
        raise BackendError(f"backend 'triton' has no kernel for {op}_pair")
    if kernels is not None and not like.is_cuda:
        raise ValueError(f"{op}_pair: x must be on a CUDA device, got {like.device}")
    return kernels


def as_dtype(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    """Return the tensors in one dtype, None as None: the kernels mix dtypes, plain PyTorch does not."""
    return [None if t is None else t.to(dtype) for t in tensors]


_loaded = build.load_module() is not None


def register(
    name: str,
    fake: Callable[..., Any],
    reference_call: Callable[..., Tensor] | None,
    tensors: Sequence[int],
    packed: int | None = None,
    triton_fake: Callable[..., Any] | None = None,
) -> None:
    """Register an op's fake and its gradient with torch, in every namespace that has its schema.

    The compiled module brings the schemas of `dualcodec_ext`; those of `dualcodec_ext_triton` are always there. The
    gradient is that of the reference, recomputed in the accumulation dtype; it can be differentiated again.

    Args:
        name: of the op.
        fake: computes the outputs' shapes, dtypes and strides.
        reference_call: the same arguments through plain PyTorch; None: the op refuses gradients.
        tensors: positions of the arguments that may need a gradient.
        packed: position of the packed weight.
        triton_fake: the Triton family's fake; None: the same.
    """
    fakes = {"dualcodec_ext": fake} if _loaded else {}
    if name in _library.SCHEMAS:
        fakes[_library.NAMESPACE] = triton_fake or fake

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if reference_call is None:
            return
        if packed is not None and inputs[packed] is not None:
            # Shorter where trailing defaults were left out.
            if any(needed for i, needed in enumerate(ctx.needs_input_grad) if i != 0 and i in tensors):
                raise RuntimeError(f"{name}: packed must be None when a weight needs a gradient, got a packed weight")
            if ctx.needs_input_grad[0]:
                raise RuntimeError(f"{name}: packed must be None when the input needs a gradient, got a packed weight")
        ctx.save_for_backward(*[inputs[i] if isinstance(inputs[i], Tensor) else None for i in range(len(inputs))])
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]

    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if reference_call is None:
            raise RuntimeError(f"{name}: has no gradient; train through backend('reference')")
        args = [t if t is not None else o for t, o in zip(ctx.saved_tensors, ctx.others, strict=True)]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed and i in tensors]
        again = torch.is_grad_enabled()  # create_graph=True: this gradient's own graph must reach back to the inputs
        dtype = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
        with torch.enable_grad(), torch.autocast(grads[0].device.type, enabled=False):
            for i in wanted:
                # A tensor passed twice becomes two here: each place gets its own gradient.
                args[i] = args[i].view_as(args[i]) if again else args[i].detach().requires_grad_()
            wide = [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
            y = reference_call(*wide)
            found = torch.autograd.grad(
                y, [args[i] for i in wanted], grads[0].to(dtype), create_graph=again, allow_unused=True
            )
        result: list[Any] = [None] * len(args)
        for i, grad in zip(wanted, found, strict=True):
            result[i] = torch.zeros_like(args[i]) if grad is None else grad
        return tuple(result)

    for namespace, own in fakes.items():
        torch.library.register_fake(f"{namespace}::{name}", own)
        torch.library.register_autograd(f"{namespace}::{name}", backward, setup_context=setup_context)


def register_out(name: str) -> None:
    """Register the fake of an op's overload `out`, which writes into memory that is there and returns nothing.

    It is the engine's own: it takes no gradient, and stands in the compiled module alone.
    """
    if _loaded:
        torch.library.register_fake(f"dualcodec_ext::{name}.out", lambda *args, **kwargs: None)


def empty_signal(like: Tensor, channels: int, steps: Any) -> Tensor:
    """Return an empty [B, channels, steps] in the layout of `like`, for fakes."""
    batch = like.shape[0]
    if like.stride(1) == 1:
        return like.new_empty(batch, steps, channels).transpose(1, 2)
    return like.new_empty(batch, channels, steps)


def steps_or_none(in_steps: Any, out_steps: Any) -> Any:
    """Return out_steps, or 0 where it is negative or there is no input, for fakes; symbolic values are guarded on."""
    if isinstance(in_steps, int) and isinstance(out_steps, int):
        return 0 if in_steps == 0 else max(0, out_steps)
    # Loads torch's symbolic shapes, which are loaded already where a value is symbolic.
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return 0 if guard_or_false(in_steps == 0) or guard_or_false(out_steps < 0) else out_steps


def conv_steps(steps: Any, taps: int, stride: int, dilation: int, padding: Sequence[int]) -> Any:
    """Return the output steps of a convolution, for fakes; symbolic steps give symbolic ones."""
    span = steps + padding[0] + padding[1] - dilation * (taps - 1) - 1
    return steps_or_none(steps, span // stride + 1)


def check_types(op: str, tensors: dict[str, Any], optional: dict[str, Any], **integers: Any) -> None:
    """Raise one line unless arguments, given by name, are of their types; the dispatcher's own error fills a page."""
    for values, needed in ((tensors, True), (optional, False)):
        for name, value in values.items():
            if not isinstance(value, Tensor) and (needed or value is not None):
                raise ValueError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    for name, value in integers.items():
        if isinstance(value, bool) or not (isinstance(value, int | torch.SymInt) or hasattr(value, "__index__")):
            raise ValueError(f"{op}: {name} must be an integer, got {value!r}")


def check_pair(op: str, padding: Sequence[int]) -> list[int]:
    """Return padding as a list; raise one line unless it is two integers."""
    try:
        left, right = (int(p) for p in padding)
    except (TypeError, ValueError):
        raise ValueError(f"{op}: padding must be two integers (left, right), got {padding!r}") from None
    return [left, right]
