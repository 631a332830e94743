"""smart: keep predictions the same under the worst small change of the input embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from childtuning.errors import ConfigError
from childtuning.methods.checks import check_positive
from childtuning.methods.divergence import divergence
from childtuning.methods.perturbation import noise_like, perturbed_logits
from childtuning.methods.registry import register
from childtuning.training import LossStep, Method

_NORMS = ("inf", "l2")


@register
@dataclass(frozen=True)
class Smart(Method):
    """Add α·ℓ(f(x̃), f(x)) to the loss: the smoothness-inducing regularisation of SMART, with its algorithm 1.

    x̃ = x + Π(ν + η·g/‖g‖) with ν ~ N(0, σ²) and g = ∇_x̃ ℓ(f(x + ν), f(x)), where f(x) is held fixed; Π projects onto
    the ball ‖x̃ − x‖ ≤ ε. x are the input embeddings, and norms are per example; what has no influence on ℓ, such as
    padding, has no noise and no share in them. ℓ is KL(p‖q) + KL(q‖p), or the squared
    difference in regression. The added term has gradients through both passes. The second part of the paper, the
    Bregman proximal point method, is not included.

    The widely used code differs: it normalises the sum ν + η·g of each token after the step and does not project, so
    that every token moves by about 1 in its largest coordinate, a million times ε and much more than an embedding.
    There ε only prevents division by zero. This method uses the paper's step, for which its hyperparameters are
    meaningful; with the defaults nearly every coordinate ends at ±ε. That code also holds p in KL(p‖q) fixed, whereas
    the paper differentiates both distributions.

    Dropout is fresh in each of the three passes, including the one for g, as in that code. Gradient checkpointing must
    be non-reentrant, which is the default of transformers.

    Args:
        weight: α (the paper's λ_s), above 0; typical values are 1 to 5.
        step: η, the length of the ascent step before the projection.
        noise_variance: σ, the standard deviation of the initial noise; the name is that of the widely used code.
        epsilon: ε, the radius of the ball, in units of the embeddings.
        norm: "inf" or "l2".
    """

    name = "smart"
    summary = "keep predictions the same under adversarial noise on the input embeddings"
    source = "Jiang et al. 2020, arXiv 1911.03437"
    trains = "the child's entries"
    memory = "a second pass's activations, after a third's"
    part = "loss"

    weight: float = 1.0
    step: float = 1e-3
    noise_variance: float = 1e-5
    epsilon: float = 1e-6
    norm: str = "inf"

    def __post_init__(self) -> None:
        check_positive(self)
        if self.norm not in _NORMS:
            raise ConfigError(f"norm of 'smart' must be one of {', '.join(_NORMS)}, got {self.norm!r}.")

    def loss(self, loss: Tensor, step: LossStep) -> Tensor:
        """Add the term."""
        starts: list[Tensor] = []
        axes: list[int] = []

        def start(x: Tensor, example_axis: int) -> Tensor:
            starts.append(noise_like(x).normal_(0.0, self.noise_variance).requires_grad_())
            axes.append(example_axis)
            return starts[-1]

        nearby = divergence(step, perturbed_logits(step, start), step.logits.detach())
        gradients = torch.autograd.grad(nearby, starts, allow_unused=True)
        ends = map(self._ascended, starts, gradients, axes)
        worst = perturbed_logits(step, lambda x, example_axis: next(ends))
        return loss + self.weight * step.weight * divergence(step, step.logits, worst)

    @torch.no_grad()
    def _ascended(self, noise: Tensor, gradient: Tensor | None, example_axis: int) -> Tensor:
        """Take one ascent step and project onto the ball."""
        moved = noise.detach()
        if gradient is not None:
            length = self._length(gradient, example_axis).clamp_min(torch.finfo(gradient.dtype).tiny)
            reached = (gradient != 0).any(-1, keepdim=True)
            moved = (moved + self.step * (gradient / length)) * reached
        if self.norm == "inf":
            return moved.clamp(-self.epsilon, self.epsilon)
        return moved * (self.epsilon / self._length(moved, example_axis)).clamp_max(1.0)

    def _length(self, x: Tensor, example_axis: int) -> Tensor:
        others = [axis for axis in range(x.ndim) if axis != example_axis]
        order = float("inf") if self.norm == "inf" else 2.0
        return torch.linalg.vector_norm(x, order, dim=others, keepdim=True)
