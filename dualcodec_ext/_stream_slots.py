"""What both kinds of stream share: the engine behind them, and which slots take part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .engine import Engine
from .errors import DualCodecError
from .model import DualCodec


def stream_engine(name: str, model: DualCodec) -> Engine:
    """Return the engine with the model's weights as they are now."""
    if not isinstance(model, DualCodec):
        raise DualCodecError(f"{name}: model must be a dualcodec_ext.DualCodec, got {_kind(model)}")
    if model.training:
        raise DualCodecError(f"{name}: the model must be in eval mode, got training mode: call .eval()")
    graphs = model._engine()
    if graphs is None:
        raise DualCodecError(f"{name}: the engine must be able to run here; dx.doctor() says why it is not")
    engine: Engine = graphs.engine
    return engine


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def whole_number(name: str, what: str, value: object, least: int) -> int:
    """Return value as it is, or raise one line."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise DualCodecError(f"{name}: {what} must be a whole number from {least}, got {value!r}")
    return value


def got(value: object) -> str:
    """Say what came instead of a tensor that was asked for."""
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


class Slots:
    """`batch_size` slots, each with a stream of its own."""

    name = ""
    batch_size: int

    def _taking_part(self, mask: Tensor | Sequence[bool] | None) -> tuple[int, ...]:
        if mask is None:
            return self._all
        flags = mask.tolist() if isinstance(mask, Tensor) else mask
        if (
            not isinstance(flags, Sequence)
            or len(flags) != self.batch_size
            or not all(isinstance(flag, bool) for flag in flags)
        ):
            raise DualCodecError(f"{self.name}: mask must be [{self.batch_size}] bool, got {mask}")
        return tuple(b for b, flag in enumerate(flags) if flag)

    def _set_batch(self, batch_size: int) -> None:
        self.batch_size = whole_number(self.name, "batch_size", batch_size, 1)
        self._all = tuple(range(batch_size))

    def _agreeing(self, state: Mapping[str, Any], own: Mapping[str, object]) -> str:
        """Return the name of what takes a state, once it is one and agrees with what is our own."""
        name = f"{self.name}.load_state_dict"
        if not isinstance(state, Mapping):
            raise DualCodecError(f"{name}: state must be what state_dict gave, got {type(state).__name__}")
        for key, value in own.items():
            if state.get(key) != value:
                raise DualCodecError(f"{name}: {key} must be {value}, got {state.get(key)}")
        return name


def check_rows(name: str, what: str, rows: object, shape: Sequence[int | None], dtype: torch.dtype) -> Tensor:
    """Return rows of a state, if they have the shape, None of any size, and the dtype."""
    if (
        isinstance(rows, Tensor)
        and rows.dtype == dtype
        and rows.dim() == len(shape)
        and all(wanted in (None, n) for n, wanted in zip(rows.shape, shape, strict=True))
    ):
        return rows
    wanted = ", ".join("n" if n is None else str(n) for n in shape)
    raise DualCodecError(f"{name}: {what} must be [{wanted}] {dtype}, got {got(rows)}")
