"""Inner optimizers that torch does not have: with a pull towards the start, RecAdam, and the official code's AdamW."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, MutableMapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

START = "start"


def evaluated(closure: Callable[[], float] | None) -> float | None:
    """Return the loss of a step's closure, with gradients on, or ``None`` where there is none."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def remember_start(state: MutableMapping[str, Any], parameter: Tensor) -> None:
    """Keep a copy of a parameter in its optimizer state, if there is none yet."""
    if START not in state:
        state[START] = parameter.detach().clone(memory_format=torch.preserve_format)


def pull_(parameter: Tensor, start: Tensor, rate: float) -> None:
    """Move a parameter by a share of the way back to its start, in place: w ← w − rate·(w − w0).

    A rate above 1 would throw the parameter past its start, further at every step, and counts as 1.
    """
    parameter.lerp_(start, min(rate, 1.0))


@cache
def anchored(inner: type[Optimizer]) -> type[Optimizer]:
    """Make of an optimizer one that pulls parameters towards where they started. [Li et al. 2018, arXiv 1802.01483]

        w ← w − lr·anchor·(w − w0),   then the inner optimizer's own step

    with w0 the value before the parameter's first update. Like decoupled weight decay the pull does not pass through
    the moments, and the gradient is the one at w. The state holds w0, so that it costs what is trained and resumes
    with it; at ``anchor=0`` there is no w0 and the step is the inner one's.

    Args:
        inner: any class of ``torch.optim``.
    Returns:
        a subclass with the option ``anchor`` (λ, default 0), which groups may set for themselves.
    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> opt = anchored(torch.optim.SGD)([w], lr=0.5, anchor=0.5)
        >>> for gradient in (2.0, 0.0):  # 1 − 0.5·2 = 0, then a quarter of the way back
        ...     w.grad = torch.tensor([gradient])
        ...     opt.step()
        >>> w.tolist()
        [0.25]
    """

    class Anchored(inner):
        def __init__(self, params: Any, *args: Any, anchor: float = 0.0, **options: Any) -> None:
            super().__init__(params, *args, **options)
            self.defaults["anchor"] = anchor
            for group in self.param_groups:
                group.setdefault("anchor", anchor)

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
            loss = evaluated(closure)
            new: dict[Tensor, dict[str, Tensor]] = {}
            for group in self.param_groups:
                if not group["anchor"]:
                    continue
                for parameter in group["params"]:
                    if parameter.grad is None:
                        continue
                    state = self.state[parameter]
                    if START in state:
                        pull_(parameter, state[START], float(group["lr"]) * group["anchor"])
                    else:
                        remember_start(new.setdefault(parameter, {}), parameter)
            super().step()
            for parameter, start in new.items():  # not before: inner optimizers set up a state that is empty
                self.state[parameter].update(start)
            return loss

    own = inspect.signature(inner)
    option = inspect.Parameter("anchor", inspect.Parameter.KEYWORD_ONLY, default=0.0)
    others = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    rest = [p for p in own.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    Anchored.__signature__ = own.replace(parameters=[*others, option, *rest])  # type: ignore[attr-defined]
    Anchored.__name__ = Anchored.__qualname__ = f"Anchored{inner.__name__}"
    Anchored.__doc__ = f"{inner.__name__} that pulls parameters towards where they started."
    return Anchored


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
