"""Slow, obvious twins of the methods that change the update, on dense float64 tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]
GradientFn = Callable[[Weights, Any], Weights]

BETAS, EPS = (0.9, 0.999), 1e-8


@dataclass
class Course:
    """A training, but for what its method does.

    Attributes:
        start: the pretrained weights.
        gradient: of the loss, at given weights on a given batch.
        batches: for each step those that are accumulated; their mean is the step's gradient.
        rates: for each step the learning rate.
        shares: by name, what of the learning rate applies.
        masks: for each step, by name, what the gradient is multiplied with.
        moves: by name, True where anything may move.
        decay: by name, the weight decay.
    """

    start: Weights
    gradient: GradientFn
    batches: list[list[Any]]
    rates: list[float]
    shares: dict[str, float]
    masks: list[Weights]
    moves: Weights
    decay: dict[str, float]

    def masked_gradient(self, weights: Weights, step: int) -> Weights:
        found = [self.gradient(weights, batch) for batch in self.batches[step]]
        return {name: sum(g[name] for g in found) / len(found) * self.masks[step][name] for name in weights}


class Adam:
    """m̂ / (√v̂ + eps) of one parameter."""

    def __init__(self) -> None:
        self.first: Tensor | float = 0.0
        self.second: Tensor | float = 0.0

    def direction(self, gradient: Tensor, t: int) -> Tensor:
        self.first = BETAS[0] * self.first + (1 - BETAS[0]) * gradient
        self.second = BETAS[1] * self.second + (1 - BETAS[1]) * gradient**2
        return (self.first / (1 - BETAS[0] ** t)) / ((self.second / (1 - BETAS[1] ** t)).sqrt() + EPS)


def l2_sp(course: Course, pull: dict[str, float]) -> Weights:
    """w ← w − lr·λ·(w − w0), then AdamW; λ by name, so that zeros make it AdamW."""
    weights = dict(course.start)
    adam = {name: Adam() for name in weights}
    for step, rate in enumerate(course.rates):
        gradient = course.masked_gradient(weights, step)
        for name, old in weights.items():
            lr = rate * course.shares[name]
            w = old - lr * pull[name] * (old - course.start[name])
            w = w - lr * course.decay[name] * w
            w = w - lr * adam[name].direction(gradient[name], step + 1)
            weights[name] = torch.where(course.moves[name], w, old)
    return weights


def recadam(course: Course, heads: set[str], *, k: float, t0: int, weight: float) -> Weights:
    """w ← w − lr·λ(t)·Adam(g), then w ← w − lr·(1 − λ(t))·γ·(w − w0); AdamW on heads; AdamW's decay on all."""
    weights = dict(course.start)
    adam = {name: Adam() for name in weights}
    for step, rate in enumerate(course.rates):
        gradient = course.masked_gradient(weights, step)
        t = step + 1
        for name, old in weights.items():
            lr = rate * course.shares[name]
            share = 1.0 if name in heads else 1 / (1 + math.exp(-k * (t - t0)))
            w = old - lr * course.decay[name] * old
            w = w - lr * share * adam[name].direction(gradient[name], t)
            w = w - lr * (1 - share) * weight * (w - course.start[name])
            weights[name] = torch.where(course.moves[name], w, old)
    return weights


def sam_gradient(gradient: GradientFn, radius: float, displaced: Weights) -> GradientFn:
    """The gradient at w + ρ·g/‖g‖, with g the gradient at w, zero outside ``displaced``."""

    def worst_gradient(weights: Weights, batch: Any) -> Weights:
        found = gradient(weights, batch)
        ascent = {name: torch.where(displaced[name], g, 0.0) for name, g in found.items()}
        norm = math.sqrt(sum(float((g**2).sum()) for g in ascent.values()))
        return gradient({name: w + radius * ascent[name] / norm for name, w in weights.items()}, batch)

    return worst_gradient
