"""l2-sp: decay towards the pretrained values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from childtuning.errors import ConfigError
from childtuning.methods.registry import register
from childtuning.optim.inner import evaluated
from childtuning.optim.state import START
from childtuning.training import Method


@register
@dataclass(frozen=True)
class L2SP(Method):
    """Decay trained weights towards their pretrained values before each step: w ← w − lr·λ·(w − w0).

    The penalty λ/2·‖w − w0‖² of the paper, as decoupled decay, so that it does not affect the moments. New heads have
    no pretrained value and are not decayed. It is used in addition to weight decay.

    Args:
        weight: λ, at least 0. Over a run the total decay is about lr·λ·steps: 1 to 100 at AdamW's rates. The paper's
            0.001 to 0.1 are for SGD's rates, which are about a hundred times larger.
    """

    name = "l2-sp"
    summary = "decay towards the pretrained values instead of towards zero"
    source = "Li et al. 2018, arXiv 1802.01483"
    trains = "the child's entries, decayed towards their initial values"
    memory = "n more: the initial values"
    part = "update"
    excludes: ClassVar[Mapping[str, str]] = {
        "recadam": "both pull the weights towards the pretrained ones",
        "mixout": "both pull the weights towards the pretrained ones",
    }
    acts_on_pretrained = True
    shards = True

    weight: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ConfigError(f"weight of 'l2-sp' must not be negative, got {self.weight}. Pass weight=10.")

    def inner(
        self, inner: type[Optimizer], options: dict[str, Any]
    ) -> tuple[type[Optimizer], dict[str, Any]]:
        """Return the inner optimizer with decay towards the initial values."""
        return anchored(inner), {**options, "anchor": self.weight}

    def group_options(
        self, model: nn.Module, always: tuple[str, ...], options: Mapping[str, Any]
    ) -> dict[str, dict[str, Any]]:
        """Turn the decay off for heads."""
        return {name: {"anchor": 0.0} for name in always}


def remember_start(state: MutableMapping[str, Any], parameter: Tensor) -> None:
    """Store a copy of a parameter in its optimizer state, unless there is one."""
    if START not in state:
        state[START] = parameter.detach().clone(memory_format=torch.preserve_format)


def pull_(parameter: Tensor, start: Tensor, rate: float) -> None:
    """Move a parameter towards its initial value, in place: w ← w − rate·(w − w0).

    A rate above 1 is reduced to 1: it would move the parameter past its initial value, further in every step.
    """
    parameter.lerp_(start, min(rate, 1.0))


@cache
def anchored(inner: type[Optimizer]) -> type[Optimizer]:
    """Return an optimizer class that decays parameters towards their initial values. [Li et al. 2018, arXiv 1802.01483]

        w ← w − lr·anchor·(w − w0),   then the inner optimizer's own step

    with w0 the value before the parameter's first update. As with decoupled weight decay, the decay does not affect the
    moments, and the gradient is the one at w. w0 is part of the state: it needs memory for the trained entries only,
    and is saved in checkpoints. With ``anchor=0`` there is no w0 and the step is the inner optimizer's.

    Args:
        inner: any class of ``torch.optim``.
    Returns:
        a subclass with the option ``anchor`` (λ, default 0), which each group may set.
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
            for (
                parameter,
                start,
            ) in new.items():  # after the step: inner optimizers initialise only an empty state
                self.state[parameter].update(start)
            return loss

    own = inspect.signature(inner)
    option = inspect.Parameter("anchor", inspect.Parameter.KEYWORD_ONLY, default=0.0)
    others = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    rest = [p for p in own.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    Anchored.__signature__ = own.replace(parameters=[*others, option, *rest])  # type: ignore[attr-defined]
    Anchored.__name__ = Anchored.__qualname__ = f"Anchored{inner.__name__}"
    Anchored.__doc__ = f"{inner.__name__} that decays parameters towards their initial values."
    return Anchored
