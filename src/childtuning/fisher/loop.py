"""The definition: one example, one backward pass, one square.

    F = (1/n) Σ_j g_j²,   g_j = ∂ℓ_j/∂θ,   ℓ_j the loss of the batch that holds example j alone, as it was given

Slow, and right for every differentiable model. Tests compare the faster paths with it, and it runs where none of them
applies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd.function import BackwardCFunction

from childtuning.errors import DataError
from childtuning.fisher.batches import example
from childtuning.fisher.sums import ScoreSums

ScalarLoss = Callable[[nn.Module, Any], Tensor]


def add_example_squares_(
    sums: ScoreSums,
    model: nn.Module,
    batch: Any,
    size: int,
    loss_fn: ScalarLoss,
    parameters: Mapping[str, Tensor],
) -> bool:
    """Add the squared gradient of each example.

    Args:
        sums: what is added to.
        batch: of ``size`` examples.
        loss_fn: the loss of a batch of one, a scalar.
        parameters: those to differentiate, by name.
    Returns:
        whether the loss of any example depends on the parameters.
    Raises:
        DataError: a loss is no finite number.
    """
    is_reached = False
    for index in range(size):
        loss = loss_fn(model, example(batch, size, index))
        check_finite(loss)
        if loss.requires_grad:
            is_reached = take_gradients(loss, parameters, sums.add_square) or is_reached
    return is_reached


def add_batch_squares_(
    sums: ScoreSums, model: nn.Module, batch: Any, loss_fn: ScalarLoss, parameters: Mapping[str, Tensor]
) -> bool:
    """Add the square of the batch's mean gradient, each parameter's clipped to norm 1 on its own. [official code]

    Returns:
        whether the loss depends on any of the parameters.
    """

    def add_clipped(name: str, gradient: Tensor) -> None:
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        sums.add_square(name, gradient * (1.0 / (gradient.norm() + 1e-6)).clamp(max=1.0))

    loss = loss_fn(model, batch)
    check_finite(loss)
    return loss.requires_grad and take_gradients(loss, parameters, add_clipped)


@contextmanager
def differentiable(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Let parameters require a gradient inside the context.

    This includes every parameter that training would change, not only the scored ones: a reentrant checkpoint passes
    no gradient unless one of its inputs requires it.
    """
    parameters = list(parameters)
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(False)


def check_finite(losses: Tensor) -> None:
    """Refuse losses that are not finite numbers. Fake tensors have no values to look at.

    Raises:
        DataError: one of them is not.
    """
    if isinstance(losses, FakeTensor):
        return
    if not bool(losses.isfinite().all()):
        worst = losses[~losses.isfinite()][0] if losses.dim() else losses
        raise DataError(f"the loss is {worst.item()}. Check the labels, or use float32.")


def take_gradients(
    loss: Tensor, parameters: Mapping[str, Tensor], take_fn: Callable[[str, Tensor], None]
) -> bool:
    """Differentiate; pass on each gradient as soon as it is complete and free it before the next one.

    Parameters that the loss does not depend on are skipped. A function written in Python, such as a reentrant
    checkpoint, may run a backward pass of its own; the gradients of all leaves then accumulate until the end. Leaves
    that are not among the parameters keep their ``.grad``.

    Returns:
        whether there was any gradient.
    """
    leaves, has_own_passes = _leaves(loss)
    own = {id(parameter) for parameter in parameters.values()}
    taken: set[str] = set()

    def take(parameter: Tensor, name: str) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            taken.add(name)
            take_fn(name, gradient.to_dense() if gradient.is_sparse else gradient)

    with ExitStack() as after:
        if has_own_passes:
            for leaf in leaves:
                after.callback(setattr, leaf, "grad", leaf.grad)
                leaf.grad = None
            loss.backward()
            for name, parameter in parameters.items():
                take(parameter, name)
            return bool(taken)
        for name, parameter in parameters.items():
            hook = partial(take, name=name)
            after.callback(parameter.register_post_accumulate_grad_hook(hook).remove)
        reached = [leaf for leaf in leaves if id(leaf) in own]
        if reached:
            loss.backward(inputs=reached)
    return bool(taken)


def _leaves(loss: Tensor) -> tuple[list[Tensor], bool]:
    """Return the leaves of the loss's graph, and whether it contains a function written in Python."""
    leaves, has_own_passes = [], False
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction):
            has_own_passes = has_own_passes or not getattr(
                getattr(node, "_forward_cls", None), "is_one_pass", False
            )
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.append(leaf)
        stack.extend(after for after, _ in node.next_functions)
    return leaves, has_own_passes
