"""Twins of the paper's own code, written from its behaviour: optimizer, Fisher pass and selection.

They do what that code does at the cost at which it does it: masks of full size keyed by tensor, a fresh one drawn
through ``torch.distributions`` for every parameter and step in the task-free mode, moments of full size, one update a
parameter, and a percentile of all scores on the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli
from torch.optim import Optimizer


class OfficialChildTuning(Optimizer):
    """AdamW with eps outside the bias correction and decay last, on masked gradients.

    Args:
        params: parameters.
        mode: ``"D"`` multiplies by fixed masks; ``"F"`` by fresh ones, and divides by the density.
        density: the share that is trained.
        masks: for D, by parameter tensor.
        lr, betas, eps, weight_decay: of the update.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        mode: Literal["D", "F"],
        density: float,
        masks: Mapping[Tensor, Tensor] | None = None,
        *,
        lr: float = 2e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.mode, self.density, self.masks = mode, density, masks or {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad = p.grad
                if self.mode == "F":
                    chances = Bernoulli(grad.new_full(grad.shape, self.density))
                    grad.mul_(chances.sample() / self.density)
                elif p in self.masks:
                    grad.mul_(self.masks[p])
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["first"], state["second"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                t, first, second = state["step"], state["first"], state["second"]
                first.mul_(beta1).add_(grad, alpha=1 - beta1)
                second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                root = second.sqrt().add_(group["eps"])
                size = group["lr"] * math.sqrt(1 - beta2**t) / (1 - beta1**t)
                p.addcdiv_(first, root, value=-size)
                p.add_(p, alpha=-group["lr"] * group["weight_decay"])


def eligible(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what the task-driven mode masks: the names that contain ``layer``."""
    return {name: p for name, p in model.named_parameters() if "layer" in name}


def official_fisher(model: Any, batches: Iterable[dict[str, Tensor]]) -> dict[Tensor, Tensor]:
    """Square each batch's mean gradient, every tensor clipped to norm 1 on its own, in ``train()`` mode."""
    batches = list(batches)
    model.train()
    chosen = eligible(model)
    scores: dict[Tensor, Tensor] = {p: torch.zeros_like(p) for p in chosen.values()}
    for batch in batches:
        model(**batch).loss.backward()
        for p in chosen.values():
            if p.grad is None:
                continue
            nn.utils.clip_grad_norm_(p, 1.0)
            scores[p] += p.grad**2 / len(batches)
        model.zero_grad()
    return scores


def official_masks(scores: Mapping[Tensor, Tensor], density: float) -> dict[Tensor, Tensor]:
    """Keep what reaches the percentile of all scores, concatenated on the host."""
    everything = np.concatenate([score.detach().cpu().numpy().reshape(-1) for score in scores.values()])
    threshold = float(np.percentile(everything, (1 - density) * 100))
    return {p: score >= threshold for p, score in scores.items()}
