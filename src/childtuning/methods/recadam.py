"""recadam: recall of the pretrained values that fades while the task's objective fades in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from childtuning.errors import ConfigError
from childtuning.methods.registry import register
from childtuning.optim import RecAdam
from childtuning.training import Method

_OF_ADAMW = ("lr", "betas", "eps", "weight_decay")


@register
@dataclass(frozen=True)
class RecallAdam(Method):
    """Fade from a pull towards the pretrained values to AdamW, with λ(t) = σ(k·(t − t0)) of the t-th step.

        w ← w − lr·λ(t)·Adam(g);   w ← w − lr·(1 − λ(t))·γ·(w − w0)

    New heads are trained by plain AdamW. Before about t0 − 5/k steps hardly anything but the head moves, so t0 belongs
    below the number of steps.

    Args:
        k: how steeply λ rises, above 0; the paper tries 0.05 to 1.
        t0: the step at which λ is a half; the paper tries 100 to 1000.
        weight: γ, at least 0.
    """

    name = "recadam"
    summary = "AdamW that fades in over a pull towards the pretrained values"
    source = "Chen et al. 2020, arXiv 2004.12651"
    trains = "what the child says, pulled to its start at first"
    memory = "n more: the start"
    part = "update"
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
        """Take AdamW's place.

        Raises:
            ConfigError: another optimizer was asked for.
        """
        if inner is not torch.optim.AdamW:
            raise ConfigError(f"'recadam' takes AdamW's place, got {inner.__name__}. Leave optim out.")
        kept = {name: value for name, value in options.items() if name in _OF_ADAMW}
        return RecAdam, {**kept, "k": self.k, "t0": self.t0, "weight": self.weight}

    def group_options(
        self, model: nn.Module, always: tuple[str, ...], options: Mapping[str, Any]
    ) -> dict[str, dict[str, Any]]:
        """Train heads by plain AdamW."""
        return {name: {"anchored": False} for name in always}
