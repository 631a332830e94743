"""An inner optimizer that torch does not have: the official code's AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


def evaluated(closure: Callable[[], float] | None) -> float | None:
    """Return the loss of a step's closure, with gradients enabled; ``None`` without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class OfficialAdamW(Optimizer):
    """Adam as early Hugging Face releases had it, which the official code builds on.

        m ← β1·m + (1−β1)·g,   v ← β2·v + (1−β2)·g²
        w ← w − lr · √(1−β2ᵗ)/(1−β1ᵗ) · m / (√v + eps)
        w ← w − lr · weight_decay · w

    It departs from ``torch.optim.AdamW`` in that eps stands outside the bias correction and decay comes last.

    Args:
        params: parameters or groups.
        lr, betas, eps, weight_decay: as in the equations.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = evaluated(closure)
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                state["step"] += 1
                first, second, t = state["exp_avg"], state["exp_avg_sq"], state["step"]
                first.mul_(beta1).add_(p.grad, alpha=1 - beta1)
                second.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                correction = (1 - beta2**t) ** 0.5 / (1 - beta1**t)
                p.addcdiv_(first, second.sqrt().add_(group["eps"]), value=-group["lr"] * correction)
                p.add_(p, alpha=-group["lr"] * group["weight_decay"])
        return loss
