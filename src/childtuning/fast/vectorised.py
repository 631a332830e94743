"""Squared per-example gradients by ``torch.func``: one vectorised pass for parameters without a rule.

Shapes: B examples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

_ENTRIES_AT_ONCE = 1 << 24  # of gradients: examples are taken in chunks


class HeldElsewhereError(Exception):
    """A parameter is reached by a reference that cannot be replaced for a call: a list, a view, a loss function."""


def vectorised_squares(
    parameters: Mapping[str, Tensor],
    loss_fn: Callable[[Mapping[str, Tensor], list[Tensor]], Tensor],
    tensors: list[Tensor],
) -> dict[str, Tensor]:
    """Return Σ_b (∂ℓ_b/∂θ)², by parameter.

    Args:
        parameters: θ, by name; they require a gradient, which shows where the loss depends on them otherwise.
        loss_fn: ``loss_fn(parameters, tensors) -> scalar``, the loss of one example alone; the tensors have the
            length 1 on their first axis.
        tensors: those of the batch that count examples, each [B, …].
    Raises:
        HeldElsewhereError: the loss depends on θ by another way than ``loss_fn``'s argument.
        Exception: what ``torch.func`` raises where a model cannot be vectorised.
    """

    def alone(parameters: dict[str, Tensor], rows: list[Tensor]) -> Tensor:
        return loss_fn(parameters, [row.unsqueeze(0) for row in rows])

    detached = {name: parameter.detach() for name, parameter in parameters.items()}
    size = len(tensors[0])
    chunk = max(1, min(size, _ENTRIES_AT_ONCE // max(1, sum(p.numel() for p in detached.values()))))
    squares: dict[str, Tensor] = {}
    for start in range(0, size, chunk):
        rows = [tensor[start : start + chunk] for tensor in tensors]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            gradients, losses = vmap(grad_and_value(alone), in_dims=(None, 0))(detached, rows)
        if losses.requires_grad:
            raise HeldElsewhereError("its weight is also used from a place that is no module's parameter")
        for name, found in gradients.items():
            found = found.to(torch.promote_types(found.dtype, torch.float32)).square().sum(0)
            squares[name] = squares[name].add_(found) if name in squares else found
    return squares
