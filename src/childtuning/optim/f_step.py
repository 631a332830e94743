"""The task-free step, in plain torch: the definition, and what serves wherever no fast path does.

    w ← inner(w, g ⊙ M_t / p),   M_t ~ Bernoulli(p) anew each step        [Xu et al. 2021, eq. 4–5]

with g the gradient accumulated over the step's batches, clipped before it is masked, as in the paper. The masked
gradient is what enters the moments, so that an entry that is masked out in this step still moves by its momentum and
its decay. What the child exempts (``always``, such as a new head) has M_t = 1 and is not divided by p.

The masks are ``TaskFree.mask``: a function of (seed, step, parameter name, index), bit for bit the same on every
device. The official code's task-driven child, for parity, is this step under a fixed mask, without the division.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from childtuning.optim.d_step import inner_step
from childtuning.optim.trained import Trained

MaskFn = Callable[[Trained, int], Tensor | None]


@torch.no_grad()
def f_step(trained: Iterable[Trained], inner: Optimizer, mask_fn: MaskFn, step: int) -> None:
    """Update every parameter that has a gradient by one step, under this step's masks.

    Args:
        trained: parameters, each trained whole in the course of time.
        inner: any optimizer, also one that mixes the entries of a matrix.
        mask_fn: gives a parameter's bool mask at a step, or ``None`` where it has none.
        step: counted from 0.
    """
    given = []
    for t in trained:
        gradient = t.gradient()
        if gradient is None:
            continue
        gradient = t.dense(gradient).to(t.dtype)
        mask = mask_fn(t, step)
        if mask is not None:
            gradient = masked(gradient, mask.to(gradient.device))
        given.append((t, gradient * t.scale if t.scale != 1 else gradient))
    inner_step(given, inner)


def masked(gradient: Tensor, mask: Tensor) -> Tensor:
    """Return a gradient that is zero where it is masked out: a product would let NaN through."""
    return gradient * mask if gradient.is_sparse else gradient.masked_fill(~mask, 0.0)
