"""What a model's parameters were at one time, and whether they still are: looked at before every call."""

from __future__ import annotations

from itertools import chain
from operator import is_
from typing import Any, Protocol

from torch import Tensor, nn

from . import build


class Snapshot(Protocol):
    """The submodules and parameters of a model, where the parameters lie and how often each was edited."""

    def holds(self) -> bool:
        """Whether nothing has changed."""
        ...


class PlainSnapshot:
    """What tables hold, as the compiled `Snapshot` has it, for where there is no compiled module.

    Args:
        tables: dictionaries, some of whose values are tensors.
    """

    def __init__(self, tables: list[dict[str, Any]]) -> None:
        self._tables = tables
        self._held = self._look()
        self._tensors = [x for x in self._held if isinstance(x, Tensor)]
        self._seen = self._counts()

    def holds(self) -> bool:
        """Whether nothing has changed."""
        held = self._look()
        return len(held) == len(self._held) and all(map(is_, held, self._held)) and self._counts() == self._seen

    def _look(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._tables)))

    def _counts(self) -> list[tuple[Any, ...]]:
        # An inference tensor has no count.
        return [(x.data_ptr(), x.dtype, 0 if x.is_inference() else x._version) for x in self._tensors]


def snapshot_of(model: nn.Module) -> Snapshot:
    """Return what a model's parameters are now.

    A parameter or a submodule put in another's place, `.to`, and edits in place end it: PyTorch counts those. It does
    not see edits through `.data`, nor in-place ones of inference tensors. The parameters live as long as it does.
    """
    tables = [table for module in model.modules() for table in (module._modules, module._parameters)]
    # One that is empty now can't come to hold what the model was made of.
    tables = [table for table in tables if table]
    module = build.load_module()
    made: Snapshot = PlainSnapshot(tables) if module is None else module.Snapshot(tables)
    return made
