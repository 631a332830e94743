"""r3f: keep predictions the same when noise is added to the input."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from childtuning.errors import ConfigError
from childtuning.methods.checks import check_positive
from childtuning.methods.divergence import divergence
from childtuning.methods.perturbation import noise_like, perturbed_logits
from childtuning.methods.registry import register
from childtuning.training import LossStep, Method

_NOISES = ("uniform", "normal")


@register
@dataclass(frozen=True)
class R3F(Method):
    """Add λ·[KL(p‖q) + KL(q‖p)] to the loss, where q is the prediction from input embeddings with noise.

    The noise is uniform in [−eps, eps], or normal with standard deviation eps; in regression the term is λ·(ŷ − ŷ′)².
    The term is averaged over the batch's predictions and has gradients through both passes, as in the authors' code.
    That code averages over sentences even for token-level predictions, and does not support regression.

    Args:
        weight: λ, above 0; 1, and 0.7 for RTE.
        eps: the size of the noise, in units of the embeddings; 1e-5 in the paper.
        noise: "uniform" or "normal".
    """

    name = "r3f"
    summary = "keep predictions the same under noise on the input embeddings"
    source = "Aghajanyan et al. 2020, arXiv 2008.03156"
    trains = "the child's entries"
    memory = "a second pass's activations"
    part = "loss"

    weight: float = 1.0
    eps: float = 1e-5
    noise: str = "uniform"

    def __post_init__(self) -> None:
        check_positive(self)
        if self.noise not in _NOISES:
            raise ConfigError(f"noise of 'r3f' must be one of {', '.join(_NOISES)}, got {self.noise!r}.")

    def loss(self, loss: Tensor, step: LossStep) -> Tensor:
        """Add the term."""
        noisy = perturbed_logits(step, self._noise)
        return loss + self.weight * step.weight * divergence(step, step.logits, noisy)

    def _noise(self, x: Tensor, example_axis: int) -> Tensor:
        noise = noise_like(x)
        if self.noise == "uniform":
            return noise.uniform_(-self.eps, self.eps)
        return noise.normal_(0.0, self.eps)
