"""r-drop: make the predictions of two passes with dropout agree."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from childtuning.methods.checks import check_positive
from childtuning.methods.divergence import divergence
from childtuning.methods.registry import register
from childtuning.training import LossStep, Method


@register
@dataclass(frozen=True)
class RDrop(Method):
    """Run each batch twice with fresh dropout and use the loss ½(L₁ + L₂) + α·½[KL(p₁‖p₂) + KL(p₂‖p₁)].

    In regression the second term is α·(ŷ₁ − ŷ₂)². The paper sums the two task losses; its code and this method average
    them, so that learning rates stay comparable. Its code sums the divergence over the batch; the paper's equations
    and this method average it over the batch's predictions. The reported loss includes all terms.

    Args:
        weight: α, above 0; typical values are 1 to 5.
    """

    name = "r-drop"
    summary = "run each batch twice with fresh dropout and make the predictions agree"
    source = "Liang et al. 2021, arXiv 2106.14448"
    trains = "the child's entries"
    memory = "a second pass's activations"
    part = "loss"

    weight: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self)

    def loss(self, loss: Tensor, step: LossStep) -> Tensor:
        """Average the task loss with that of a second pass, and add the term."""
        task_loss, logits = step.task_again()
        # Not half of the given loss, which may include other methods' terms.
        loss = loss + (task_loss - step.task_loss) / 2
        return loss + self.weight * step.weight * divergence(step, step.logits, logits, share=0.5)
