"""AdamW that is let go from the pretrained values by and by."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from childtuning.optim.anchored import START, pull_, remember_start
from childtuning.optim.closure import evaluated


class RecAdam(Optimizer):
    """AdamW whose step fades in while a pull towards the start fades out. [Chen et al. 2020, arXiv 2004.12651]

        λ(t) = 1 / (1 + exp(−k·(t − t0)))
        w ← w − lr·weight_decay·w
        w ← w − lr·λ(t)·m̂ / (√v̂ + eps)
        w ← w − lr·(1 − λ(t))·weight·(w − w0)

    with w0 the value before the first update, and m̂, v̂ Adam's corrected moments, which see the task's gradient whole.
    Where ``anchored`` is false, λ is 1: AdamW. It departs from the authors' code in that decay comes first and eps
    inside the bias correction, as in ``torch.optim.AdamW``, and in that a pull with lr·(1 − λ)·weight above 1 goes to
    w0 and no further; theirs diverges from 2 on, that is at the default weight with a rate above 4e-4.

    Args:
        params: parameters or groups; a group may set each of the options.
        lr, betas, eps, weight_decay: as in the equations.
        k: how steeply λ rises.
        t0: the step, counted from 1, at which λ is a half.
        weight: γ, the strength of the pull.
        anchored: whether there is a pull.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        k: float = 0.1,
        t0: float = 250,
        weight: float = 5000.0,
        anchored: bool = True,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**options, "k": k, "t0": t0, "weight": weight, "anchored": anchored})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = evaluated(closure)
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            lr = float(group["lr"])
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                    if group["anchored"]:
                        remember_start(state, p)
                state["step"] += 1
                first, second, t = state["exp_avg"], state["exp_avg_sq"], state["step"]
                share = _sigmoid(group["k"] * (t - group["t0"])) if group["anchored"] else 1.0
                p.mul_(1 - lr * group["weight_decay"])
                first.lerp_(p.grad, 1 - beta1)
                second.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                spread = second.sqrt().div_((1 - beta2**t) ** 0.5).add_(group["eps"])
                p.addcdiv_(first, spread, value=-lr * share / (1 - beta1**t))
                if group["anchored"]:
                    pull_(p, state[START], lr * (1 - share) * group["weight"])
        return loss


def _sigmoid(x: float) -> float:
    """1 / (1 + exp(−x)), which does not overflow far from 0."""
    small = math.exp(-abs(x))
    return (1.0 if x >= 0 else small) / (1 + small)
