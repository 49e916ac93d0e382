"""What the Triton ops share: csrc/checks.h's checks with the same one-line errors, allocation, and the launch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import build
from ...errors import BackendError

_NAMES = {
    torch.float32: "Float",
    torch.float64: "Double",
    torch.bfloat16: "BFloat16",
    torch.float16: "Half",
    torch.int64: "Long",
    torch.int32: "Int",
    torch.int16: "Short",
    torch.int8: "Char",
    torch.uint8: "Byte",
    torch.bool: "Bool",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
}
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype as the compiled ops' errors spell it."""
    return _NAMES.get(dtype, str(dtype))


def check(condition: bool, op: str, text: str) -> None:
    """Raise one line unless the condition holds."""
    if not condition:
        raise ValueError(f"{op}: {text}")


def check_float(op: str, name: str, t: Tensor) -> None:
    """Check that a tensor is of a dtype that the kernels read."""
    got = dtype_name(t.dtype)
    check(t.dtype in _FLOATS, op, f"{name} must be float32, float64, bfloat16 or float16, got {got}")


def check_signal(op: str, name: str, t: Tensor) -> None:
    """Check a [B, C, T] signal, which the kernels read and write in its own dtype."""
    check(t.dim() == 3, op, f"{name} must be [B, C, T], got {list(t.shape)}")
    check_float(op, name, t)
    if t.dtype == torch.float64:
        raise BackendError("backend 'triton' has no kernels for torch.float64")


def check_shape(op: str, name: str, t: Tensor, shape: Sequence[int], needed: str, like: Tensor) -> None:
    """Check a tensor's exact shape, a float dtype, and its device."""
    check(list(t.shape) == list(shape), op, f"{name} must be {needed} = {list(shape)}, got {list(t.shape)}")
    check_float(op, name, t)
    check(t.device == like.device, op, f"{name} must be on {like.device} as the input is, got {t.device}")


def vector(op: str, name: str, t: Tensor | None, size: int, like: Tensor) -> Tensor | None:
    """Return a [C] vector in memory order, or None."""
    if t is None:
        return None
    check_shape(op, name, t, [size], "[C]", like)
    return t.detach().contiguous()


def check_padding(op: str, padding: Sequence[int]) -> None:
    """Check (left, right)."""
    fine = len(padding) == 2 and min(padding) >= 0
    check(fine, op, f"padding must be two non-negative integers (left, right), got {list(padding)}")


def check_lengths(op: str, lengths: Tensor | None, batch: int, steps: int, like: Tensor) -> Tensor | None:
    """Return lengths on the device of `like`.

    The values are checked, which waits for the device where they are there; not while a CUDA graph is captured. The
    kernels clamp them to 0..T in any case.
    """
    if lengths is None:
        return None
    check(list(lengths.shape) == [batch], op, f"lengths must be [B] = [{batch}], got {list(lengths.shape)}")
    check(lengths.dtype == torch.int64, op, f"lengths must be int64, got {dtype_name(lengths.dtype)}")
    if lengths.device.type == "cpu" or not capturing():
        for b, n in enumerate(lengths.tolist()):
            check(0 <= n <= steps, op, f"lengths[{b}] must be in 0..{steps}, got {n}")
    return lengths.to(like.device).contiguous()


def check_packed(
    op: str, packed: Tensor, shape: Sequence[int], like: Tensor, dtypes: Sequence[torch.dtype] = (torch.float32,)
) -> Tensor:
    """Return a packed weight of this family: two-dimensional, which tells it from the compiled family's."""
    fine = packed.dtype in dtypes and packed.is_contiguous() and list(packed.shape) == list(shape)
    needed = f"{' or '.join(map(dtype_name, dtypes))} tensor of {shape[0] * shape[1]} elements, {list(shape)},"
    got = f"{dtype_name(packed.dtype)} {list(packed.shape)}"
    check(fine, op, f"packed must be a contiguous {needed} as backend('triton') packs this weight, got {got}")
    check(packed.device == like.device, op, f"packed must be on {like.device} as the input is, got {packed.device}")
    return packed


def capturing() -> bool:
    """Return whether a CUDA graph is being captured, when no value may be read back."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def is_channels_last(x: Tensor) -> bool:
    """Return whether channels are neighbours in memory."""
    return x.stride(1) == 1


def empty_signal(batch: int, channels: int, steps: int, like: Tensor, channels_last: bool) -> Tensor:
    """Return an uninitialised [B, C, T], with stride 1 on C when channels_last."""
    if channels_last:
        return torch.empty(batch, steps, channels, dtype=like.dtype, device=like.device).transpose(1, 2)
    return torch.empty(batch, channels, steps, dtype=like.dtype, device=like.device)


def blocks(count: int, size: int) -> int:
    """Return how many blocks of a size cover a count."""
    return -(-count // size)


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **constants: Any) -> None:
    """Run a kernel on a device's current stream, or in Triton's interpreter."""
    if device.type == "cpu" and not build.triton_interprets():
        raise BackendError("backend 'triton' needs tensors on cuda, got cpu; TRITON_INTERPRET=1 interprets it there")
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, **constants)
