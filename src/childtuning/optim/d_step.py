"""The task-driven step, in plain torch: the definition, and what serves wherever no fast path does.

    w_C ← inner(w_C, g_C / p),   every other entry keeps its bits        [Xu et al. 2021, Algorithm 1]

with C the child, g the gradient of the loss, p the child's density, and ``inner`` one step of any optimizer that treats
every entry on its own. The inner optimizer never sees an entry outside the child: it is given the child's entries of
each parameter as a tensor of their own (``Trained.value``), with their gradient, and its state is of that size. Weight
decay and momentum therefore end at the child's border. The paper masks g and updates all of w instead, so that decay
moves what it calls frozen; its code leaves the division by p away.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

from childtuning.optim.trained import Trained


@torch.no_grad()
def d_step(trained: Iterable[Trained], inner: Optimizer) -> None:
    """Update the child by one step; a parameter without a gradient stays as it is, as under torch's optimizers."""
    given = []
    for t in trained:
        gradient = t.gradient()
        if gradient is not None:
            gradient = t.dense(gradient).to(t.dtype)
            given.append((t, gradient * t.scale if t.scale != 1 else gradient))
    inner_step(given, inner)


@torch.no_grad()
def inner_step(given: Iterable[tuple[Trained, Tensor]], inner: Optimizer) -> None:
    """Let the inner optimizer see these values with these gradients, and nothing else; write what it makes of them.

    Args:
        given: parameters, and their gradients as the inner optimizer is to see them, of the shape and dtype of
            ``value``. They and the state are laid out as it is: fused optimizers take all three in the order of memory.
        inner: has been given every ``value``.
    """
    given = list(given)
    if not given:
        return
    kept = [(t.parameter, t.parameter.grad) for t, _ in given if t.is_direct]
    try:
        for t, gradient in given:
            t.read()
            t.value.grad = _laid_out_as(t.value, gradient)
            state = inner.state.get(t.value, {})
            for key, entry in state.items():
                if isinstance(entry, Tensor) and entry.shape == t.value.shape:
                    state[key] = _laid_out_as(t.value, entry)
        inner.step()
        for t, _ in given:
            t.write()
    finally:
        for t, _ in given:
            t.value.grad = None
        for parameter, gradient in kept:
            parameter.grad = gradient


def _laid_out_as(value: Tensor, tensor: Tensor) -> Tensor:
    """Return a tensor with the strides of another of its shape, such as those of ``channels_last``."""
    if tensor.layout != torch.strided or tensor.stride() == value.stride():
        return tensor
    return torch.empty_like(value, dtype=tensor.dtype).copy_(tensor)


@contextmanager
def hidden(done: Iterable[Trained]) -> Iterator[None]:
    """Keep the gradients of what was updated already from the inner optimizer; those in ``.grad`` come back after."""
    done = list(done)
    kept = [(t.parameter, t.parameter.grad) for t in done if t.is_direct]
    for t in done:
        t.value.grad = None
    try:
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient
