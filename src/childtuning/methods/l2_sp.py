"""l2-sp: decay towards the pretrained values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from childtuning.errors import ConfigError
from childtuning.methods.registry import register
from childtuning.optim import anchored
from childtuning.training import Method


@register
@dataclass(frozen=True)
class L2SP(Method):
    """Pull what is trained towards its pretrained value before each step: w ← w − lr·λ·(w − w0).

    The penalty λ/2·‖w − w0‖² of the paper, as decoupled decay, so that the moments do not see it. New heads have no
    pretrained value and are not pulled. It acts beside weight decay.

    Args:
        weight: λ, at least 0. Over a run the pull is about lr·λ·steps: 1 to 100 at AdamW's rates. The paper's
            0.001 to 0.1 belong to SGD's, some hundred times larger.
    """

    name = "l2-sp"
    summary = "decay towards the pretrained values instead of towards zero"
    source = "Li et al. 2018, arXiv 1802.01483"
    trains = "what the child says, pulled to its start"
    memory = "n more: the start"
    part = "update"
    acts_on_pretrained = True

    weight: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ConfigError(f"weight of 'l2-sp' must not be negative, got {self.weight}. Pass weight=10.")

    def inner(
        self, inner: type[Optimizer], options: dict[str, Any]
    ) -> tuple[type[Optimizer], dict[str, Any]]:
        """Let the inner optimizer pull."""
        return anchored(inner), {**options, "anchor": self.weight}

    def group_options(
        self, model: nn.Module, always: tuple[str, ...], options: Mapping[str, Any]
    ) -> dict[str, dict[str, Any]]:
        """Leave heads alone."""
        return {name: {"anchor": 0.0} for name in always}
