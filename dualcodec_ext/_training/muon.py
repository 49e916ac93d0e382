"""Muon: momentum whose matrices are made orthogonal before they are taken as a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal by Newton-Schulz rounds; convolutions count as matrices [Cout, Cin * k].

    torch.optim.Muon (Jordan et al. 2024) takes matrices alone and runs its rounds in bfloat16; a convolution's weight
    has three dimensions here. A step's root mean square is `lr * 0.2`, about AdamW's, so that one rate serves both.

    Args:
        params: parameters of two dimensions and more.
        lr: learning rate.
        momentum: of the gradients; taken with Nesterov's look ahead.
        weight_decay: decoupled, as AdamW's.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 1e-3, momentum: float = 0.9, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step; `closure`, where given, is called first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for taking in _alike(group["params"]):
                steps = []
                for p, grad in taking:
                    state: dict[str, Any] = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    momentum = state["momentum"].mul_(group["momentum"]).add_(grad)
                    steps.append(_wide(grad.add(momentum, alpha=group["momentum"]).flatten(1)))
                for (p, _), update in zip(taking, orthogonal(torch.stack(steps)), strict=True):
                    rate = group["lr"] * 0.2 * max(update.shape) ** 0.5
                    matrix = update if p.flatten(1).shape == update.shape else update.t()
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(matrix.reshape(p.shape), alpha=-rate)
        return loss


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()


def _alike(params: Iterable[Tensor]) -> Iterable[list[tuple[Tensor, Tensor]]]:
    """Put parameters that have a gradient, each with it, together where their matrices have the same sides, dtype and
    device: many are too small for one product of theirs to keep a processor busy."""
    found: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    for p in params:
        if p.grad is not None:
            sides = _wide(p.flatten(1)).shape
            found.setdefault((sides, p.dtype, p.device), []).append((p, p.grad))
    return found.values()


def orthogonal(matrices: Tensor) -> Tensor:
    """Return about U V^T of each matrix U S V^T of [N, rows, columns], rows at most columns.

    Singular values end between 0.7 and 1.2, small ones below.
    """
    x = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
