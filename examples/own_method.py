"""A custom method: the confidence penalty, a loss term that can be combined with any other method.

    python examples/own_method.py train --task docstrings --method child-d+confidence:0.3 --output runs/own
    python examples/own_method.py predict runs/own --text "Open a socket and wait for a reply."

This runs the complete childtuning command line, with one additional method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from childtuning.cli import main
from childtuning.errors import ConfigError
from childtuning.methods import register
from childtuning.training import LossStep, Method


@register
@dataclass(frozen=True)
class ConfidencePenalty(Method):
    """Subtract β times the entropy of the predictions from the loss: L − β·H(p). [Pereyra et al. 2017]

    Args:
        weight: β, above 0. As the first field, it can be given without its name: ``confidence:0.3``.
    """

    name = "confidence"
    summary = "keep predictions from being overconfident"
    source = "Pereyra et al. 2017, arXiv 1701.06548"
    trains = "what the child says"
    memory = "nothing"
    part = "loss"

    weight: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ConfigError(f"weight of 'confidence' must be above 0, got {self.weight}. Pass weight=0.1.")

    def loss(self, loss: Tensor, step: LossStep) -> Tensor:
        """Add the term; ``step.weight`` is the batch's share of the mean when gradients are accumulated."""
        log_p = step.logits.float().log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1).mean()
        return loss - self.weight * step.weight * entropy


if __name__ == "__main__":
    main()
