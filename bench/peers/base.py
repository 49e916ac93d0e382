"""What a peer is given and what it gives back."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bench.program import Program

Call = Callable[[], object]
_Module = TypeVar("_Module", bound=nn.Module)


class Unavailable(Exception):
    """This side cannot run here; the text says why."""


@dataclass(frozen=True)
class Task:
    """One call of the codec: `kind` "decode" (inputs: semantic and acoustic codes) or "encode" (audio and
    features)."""

    kind: str
    settings: Mapping[str, Any]
    program: Program
    state: Mapping[str, Tensor]  # float32, the reference's keys
    inputs: tuple[Tensor, ...]  # codes int64, audio and features float32
    threads: int
    device: str = "cpu"
    family: str = ""  # the backend that ours runs on, empty: the device's
    cache: dict[str, Any] = field(default_factory=dict)  # what several peers share, such as an exported graph

    def cast_inputs(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(x.to(dtype) if x.is_floating_point() else x for x in self.inputs)


@dataclass(frozen=True)
class Peer:
    """A way to run a task without us."""

    name: str
    dtype: torch.dtype
    what: str
    build: Callable[[Task], Call]  # raises Unavailable
    packages: tuple[str, ...] = ()  # on PyPI, beyond torch


def with_state(make: Callable[[], _Module], state: Mapping[str, Tensor]) -> _Module:
    """Make a model in eval mode whose parameters are the state's own tensors, wherever those are: no time goes into
    values that are replaced at once.

    Raises:
        RuntimeError: the state is another model's.
    """
    with torch.device("meta"):
        model = make()
    model.load_state_dict(state, assign=True)
    return model.eval()


def need(*modules: str) -> None:
    """Raise Unavailable for the first module that is not installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise Unavailable(f"{module} is not installed")
