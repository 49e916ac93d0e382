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
            for p in group["params"]:
                if p.grad is None:
                    continue
                state: dict[str, Any] = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].mul_(group["momentum"]).add_(p.grad)
                update = orthogonal(p.grad.add(momentum, alpha=group["momentum"]).flatten(1))
                scale = 0.2 * max(update.shape) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.view_as(p), alpha=-group["lr"] * scale)
        return loss


def orthogonal(matrix: Tensor) -> Tensor:
    """Return about U V^T of a matrix U S V^T: its singular values end between 0.7 and 1.2, small ones below."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
    x = wide / (torch.linalg.vector_norm(wide) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ROUNDS):
        gram = x @ x.t()
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide is matrix else x.t()
