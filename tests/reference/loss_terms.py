"""Terms of the loss, slow and obvious: one prediction and one example at a time, noise put into ``inputs_embeds``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]
PairFn = Callable[[Tensor, Tensor], Tensor]


def kl(logits: Tensor, others: Tensor) -> Tensor:
    """KL(p‖q) = Σ_c p_c log(p_c / q_c) of one prediction's classes."""
    p, q = logits.exp() / logits.exp().sum(), others.exp() / others.exp().sum()
    total = torch.zeros((), dtype=logits.dtype)
    for c in range(len(p)):
        total = total + p[c] * (p[c] / q[c]).log()
    return total


def both_ways(first: Tensor, second: Tensor) -> Tensor:
    """KL(p‖q) + KL(q‖p)."""
    return kl(first, second) + kl(second, first)


def half_both_ways(first: Tensor, second: Tensor) -> Tensor:
    """The mean of KL(p‖q) and KL(q‖p)."""
    return (kl(first, second) + kl(second, first)) / 2


def squared(first: Tensor, second: Tensor) -> Tensor:
    """(ŷ − ŷ')² of one example."""
    return ((first - second) ** 2).sum()


def per_example(first: Tensor, second: Tensor, pair: PairFn) -> Tensor:
    """Mean over examples [B, C]."""
    return torch.stack([pair(a, b) for a, b in zip(first, second, strict=True)]).mean()


def per_tag(first: Tensor, second: Tensor, pair: PairFn, labels: Tensor) -> Tensor:
    """Mean over the tokens [B, T, C] that have a label."""
    counted = [(b, t) for b in range(len(labels)) for t in range(labels.shape[1]) if labels[b, t] != -100]
    return torch.stack([pair(first[place], second[place]) for place in counted]).mean()


def per_next_token(first: Tensor, second: Tensor, pair: PairFn, labels: Tensor) -> Tensor:
    """Mean over the tokens whose next has a label."""
    counted = [
        (b, t) for b in range(len(labels)) for t in range(labels.shape[1] - 1) if labels[b, t + 1] != -100
    ]
    return torch.stack([pair(first[place], second[place]) for place in counted]).mean()


def read(model: Any, batch: Batch) -> Tensor:
    """What the network reads: the tokens' embeddings, or the image."""
    if "pixel_values" in batch:
        return batch["pixel_values"]
    return model.get_input_embeddings().weight[batch["input_ids"]]


def logits_at(model: Any, batch: Batch, x: Tensor) -> Tensor:
    """The logits where the network reads x."""
    rest = {key: value for key, value in batch.items() if key not in ("input_ids", "pixel_values", "labels")}
    return model(**{"pixel_values" if "pixel_values" in batch else "inputs_embeds": x}, **rest).logits


def r3f(model: Any, batch: Batch, logits: Tensor, apart: PairFn, *, eps: float, noise: str) -> Tensor:
    """The divergence from the prediction at x + noise."""
    x = read(model, batch)
    drawn = (
        torch.empty_like(x).uniform_(-eps, eps) if noise == "uniform" else torch.empty_like(x).normal_(0, eps)
    )
    return apart(logits, logits_at(model, batch, x + drawn))


def smart(
    model: Any,
    batch: Batch,
    logits: Tensor,
    apart: PairFn,
    *,
    eta: float,
    sd: float,
    epsilon: float,
    order: float,
) -> Tensor:
    """The divergence from the prediction at x̃, one projected ascent step from a random start, per example."""
    x = read(model, batch)
    noise = torch.empty_like(x).normal_(0, sd)
    if "attention_mask" in batch:
        noise = noise * batch["attention_mask"][:, :, None]
    start = x.detach() + noise
    start.requires_grad_()
    (gradient,) = torch.autograd.grad(apart(logits_at(model, batch, start), logits.detach()), start)
    changes = []
    for b in range(len(x)):
        change = start[b].detach() - x[b].detach() + eta * gradient[b] / gradient[b].flatten().norm(order)
        if order == 2 and change.flatten().norm() > epsilon:
            change = epsilon * change / change.flatten().norm()
        if order == float("inf"):
            change = torch.minimum(torch.maximum(change, torch.tensor(-epsilon)), torch.tensor(epsilon))
        changes.append(change)
    return apart(logits, logits_at(model, batch, x + torch.stack(changes)))
