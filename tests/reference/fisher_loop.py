"""Fisher information the obvious way: one example, one backward pass, one square."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def hugging_face_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss the model computes itself."""
    return model(**batch).loss


def alone(batch: Any, index: int, size: int) -> Any:
    """One example as a batch of one, as it was given."""
    if isinstance(batch, Tensor):
        return batch[index : index + 1] if batch.dim() and len(batch) == size else batch
    if isinstance(batch, dict):
        return {key: alone(value, index, size) for key, value in batch.items()}
    return (
        type(batch)(alone(value, index, size) for value in batch)
        if isinstance(batch, (list, tuple))
        else batch
    )


def per_example(
    model: nn.Module, batches: list[Any], loss_fn: Callable = hugging_face_loss
) -> dict[str, Tensor]:
    """(1/n) Σ_j (∂ℓ_j/∂θ)², in eval mode."""
    model.eval()
    scores = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    count = 0
    for batch in batches:
        size = len(next(iter(batch.values())) if isinstance(batch, dict) else batch[0])
        for index in range(size):
            model.zero_grad()
            loss_fn(model, alone(batch, index, size)).backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    scores[name] += parameter.grad.to_dense() ** 2
            count += 1
    model.zero_grad()
    return {name: score / count for name, score in scores.items()}


def per_batch(
    model: nn.Module, batches: list[Any], loss_fn: Callable = hugging_face_loss
) -> dict[str, Tensor]:
    """The official code's: the batch mean's gradient, each tensor clipped to norm 1, squared, averaged over batches."""
    model.train()
    scores = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in batches:
        model.zero_grad()
        loss_fn(model, batch).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                nn.utils.clip_grad_norm_(parameter, 1.0)
                scores[name] += parameter.grad.to_dense() ** 2 / len(batches)
    model.zero_grad()
    return scores
