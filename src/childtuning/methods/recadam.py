"""recadam: decay towards the pretrained values that fades out while the task objective fades in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from childtuning.errors import ConfigError
from childtuning.methods.l2_sp import pull_, remember_start
from childtuning.methods.registry import register
from childtuning.optim.inner import evaluated
from childtuning.optim.state import START
from childtuning.training import Method

_OF_ADAMW = ("lr", "betas", "eps", "weight_decay")


@register
@dataclass(frozen=True)
class RecallAdam(Method):
    """Fade from decay towards the pretrained values to AdamW, with weight λ(t) = σ(k·(t − t0)) in step t.

        w ← w − lr·λ(t)·Adam(g);   w ← w − lr·(1 − λ(t))·γ·(w − w0)

    New heads are trained with plain AdamW. Before about t0 − 5/k steps hardly anything but the head changes, so t0
    should be below the number of steps.

    Args:
        k: the steepness of λ, above 0; the paper tries 0.05 to 1.
        t0: the step at which λ is 0.5; the paper tries 100 to 1000.
        weight: γ, at least 0.
    """

    name = "recadam"
    summary = "AdamW that fades in while decay towards the pretrained values fades out"
    source = "Chen et al. 2020, arXiv 2004.12651"
    trains = "the child's entries, at first decayed towards their initial values"
    memory = "n more: the initial values"
    part = "update"
    excludes: ClassVar[Mapping[str, str]] = {
        "mixout": "both pull the weights towards the pretrained ones",
    }
    acts_on_pretrained = True

    k: float = 0.1
    t0: int = 250
    weight: float = 5000.0

    def __post_init__(self) -> None:
        if not 0 < self.k < float("inf"):
            raise ConfigError(f"k of 'recadam' must be above 0, got {self.k}. Pass k=0.1.")
        if self.t0 < 0:
            raise ConfigError(f"t0 of 'recadam' counts steps, got {self.t0}. Pass t0=250.")
        if not 0 <= self.weight < float("inf"):
            raise ConfigError(
                f"weight of 'recadam' must not be negative, got {self.weight}. Pass weight=5000."
            )

    def inner(
        self, inner: type[Optimizer], options: dict[str, Any]
    ) -> tuple[type[Optimizer], dict[str, Any]]:
        """Replace AdamW.

        Raises:
            ConfigError: when another optimizer is selected.
        """
        if inner is not torch.optim.AdamW:
            raise ConfigError(f"'recadam' replaces AdamW, got {inner.__name__}. Leave optim out.")
        kept = {name: value for name, value in options.items() if name in _OF_ADAMW}
        return RecAdam, {**kept, "k": self.k, "t0": self.t0, "weight": self.weight}

    def warning(self, num_steps: int) -> str | None:
        """Tell where the pull outweighs the task in more than half of the steps."""
        if 2 * self.t0 <= num_steps:
            return None
        return (
            f"recadam holds the network back until step {self.t0:,} of {num_steps:,}. Pass t0={num_steps // 3}, a "
            "third of the steps."
        )

    def group_options(
        self, model: nn.Module, always: tuple[str, ...], options: Mapping[str, Any]
    ) -> dict[str, dict[str, Any]]:
        """Train heads with plain AdamW."""
        return {name: {"anchored": False} for name in always}


class RecAdam(Optimizer):
    """AdamW whose step fades in while decay towards the initial values fades out. [Chen et al. 2020, arXiv 2004.12651]

        λ(t) = 1 / (1 + exp(−k·(t − t0)))
        w ← w − lr·weight_decay·w
        w ← w − lr·λ(t)·m̂ / (√v̂ + eps)
        w ← w − lr·(1 − λ(t))·weight·(w − w0)

    with w0 the value before the first update, and m̂, v̂ Adam's corrected moments of the task gradient, without λ.
    With ``anchored=False``, λ is 1: plain AdamW. There are two differences from the authors' code. Weight decay comes
    first and eps is inside the bias correction, as in ``torch.optim.AdamW``. A decay with lr·(1 − λ)·weight above 1
    stops at w0; theirs diverges from 2 on, that is at the default weight with a learning rate above 4e-4.

    Args:
        params: parameters or groups; a group may set each of the options.
        lr, betas, eps, weight_decay: as in the equations.
        k: the steepness of λ.
        t0: the step, counted from 1, at which λ is 0.5.
        weight: γ, the strength of the decay towards w0.
        anchored: whether to decay towards w0.
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
    """1 / (1 + exp(−x)), without overflow far from 0."""
    small = math.exp(-abs(x))
    return (1.0 if x >= 0 else small) / (1 + small)
