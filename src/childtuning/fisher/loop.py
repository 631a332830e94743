"""One backward pass an example: slow, and right for every differentiable model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from childtuning.errors import DataError
from childtuning.fisher.batches import example
from childtuning.fisher.losses import LossFn
from childtuning.fisher.sums import Sums


@contextmanager
def differentiable(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Let these parameters require a gradient inside, and no longer after."""
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)


def check_finite(loss: Tensor) -> None:
    """Refuse a loss that is not a finite number.

    Raises:
        DataError: it is not.
    """
    if loss.dim() != 0:
        raise DataError(
            f"the loss must be a scalar, got shape {tuple(loss.shape)}. Return the mean over the batch."
        )
    if not bool(loss.isfinite()):
        raise DataError(f"the loss is {loss.item()}. Check the labels, or use float32.")


def take_gradients(
    loss: Tensor, parameters: Mapping[str, Tensor], take_fn: Callable[[str, Tensor], None]
) -> None:
    """Differentiate; each gradient is handed over as it is formed and let go of before the next one is.

    Parameters that the loss does not reach are passed over.
    """

    def taken(gradient: Tensor, name: str) -> Tensor | None:
        if gradient.is_sparse:
            return take_fn(name, gradient.to_dense())
        take_fn(name, gradient)
        return gradient.new_zeros(()).expand(gradient.shape)  # autograd keeps this to the end: one number

    with ExitStack() as hooks:
        for name, parameter in parameters.items():
            hooks.callback(parameter.register_hook(partial(taken, name=name)).remove)
        torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)


def add_example_squares_(
    sums: Sums,
    model: nn.Module,
    batch: Any,
    loss_fn: LossFn,
    parameters: Mapping[str, Tensor],
    indices: list[int],
    size: int,
) -> tuple[list[float], bool]:
    """Add the squared gradient of each chosen example, a batch of one at a time.

    Returns:
        the examples' losses, and whether any of them depends on the parameters.
    """
    losses, reached = [], False
    with differentiable(parameters):
        for index in indices:
            loss = loss_fn(model, example(batch, index, size))
            check_finite(loss)
            losses.append(loss.item())
            if not loss.requires_grad:
                continue
            reached = True
            take_gradients(loss, parameters, sums.add_square)
    return losses, reached


def add_batch_squares_(
    sums: Sums,
    model: nn.Module,
    batch: Any,
    loss_fn: LossFn,
    parameters: Mapping[str, Tensor],
) -> bool:
    """Add the square of the batch's mean gradient, each parameter's clipped to norm 1 on its own. [official code]

    Returns:
        whether the loss depends on any of the parameters.
    """

    def add_clipped(name: str, gradient: Tensor) -> None:
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        sums.add_square(name, gradient * (1.0 / (gradient.norm() + 1e-6)).clamp(max=1.0))

    with differentiable(parameters):
        loss = loss_fn(model, batch)
        check_finite(loss)
        if not loss.requires_grad:
            return False
        take_gradients(loss, parameters, add_clipped)
    return True
