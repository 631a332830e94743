"""Slow, obvious twins of the optimizers, on dense float64 tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_adamw(
    start: dict[str, Tensor],
    gradients: list[dict[str, Tensor]],
    masks: list[dict[str, Tensor]],
    *,
    density: float,
    frozen: bool,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> dict[str, Tensor]:
    """AdamW (eps inside the bias correction, decay first) on g ⊙ M / p; ``frozen``: only masked entries move."""
    weights = {name: w.double().clone() for name, w in start.items()}
    first = {name: torch.zeros_like(w) for name, w in weights.items()}
    second = {name: torch.zeros_like(w) for name, w in weights.items()}
    for t, (gradient, mask) in enumerate(zip(gradients, masks, strict=True), start=1):
        for name, w in weights.items():
            g = gradient[name].double() * mask[name].double() / density
            first[name] = betas[0] * first[name] + (1 - betas[0]) * g
            second[name] = betas[1] * second[name] + (1 - betas[1]) * g * g
            moved = w * (1 - lr * weight_decay)
            moved = moved - lr * (first[name] / (1 - betas[0] ** t)) / (
                (second[name] / (1 - betas[1] ** t)).sqrt() + eps
            )
            weights[name] = torch.where(mask[name], moved, w) if frozen else moved
    return weights


def official_steps(
    start: dict[str, Tensor],
    gradients: list[dict[str, Tensor]],
    masks: list[dict[str, Tensor]],
    *,
    divide_by: float,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
) -> dict[str, Tensor]:
    """The official code's update: mask, moments, eps outside the bias correction, then decay on everything."""
    weights = {name: w.double().clone() for name, w in start.items()}
    first = {name: torch.zeros_like(w) for name, w in weights.items()}
    second = {name: torch.zeros_like(w) for name, w in weights.items()}
    for t, (gradient, mask) in enumerate(zip(gradients, masks, strict=True), start=1):
        for name, w in weights.items():
            g = gradient[name].double() * mask[name].double() / divide_by
            first[name] = betas[0] * first[name] + (1 - betas[0]) * g
            second[name] = betas[1] * second[name] + (1 - betas[1]) * g * g
            size = lr * (1 - betas[1] ** t) ** 0.5 / (1 - betas[0] ** t)
            w = w - size * first[name] / (second[name].sqrt() + eps)
            weights[name] = w - lr * weight_decay * w
    return weights
