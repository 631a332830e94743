"""The gradient of one parameter for each example of a batch, in the forms that layers produce, and its squares.

Shapes: B examples, T terms of an example (tokens, positions), O out, I in, V rows of a table, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from childtuning.fast.library import LIBRARY, PRODUCTS, run_tasks
from childtuning.fast.runs import cut

_TOGETHER = 4  # examples whose gradients are formed by one call, where they are small
_CACHED = 1 << 21  # entries that stay in a cache
_SMALL = 1 << 20  # multiplications that are not worth a call of the kernel
_TILE, _WIDTH = 8, 48  # the kernel's largest
_ROWS, _TERMS = 192, 2048  # a thread's at a time: so many stay in its cache


class ExampleGradients(ABC):
    """What a rule returns for one parameter: G_b, the gradient of example b's own loss, for b = 1…B.

    ``num_examples`` is B, ``shape`` the parameter's.
    """

    num_examples: int
    shape: torch.Size

    @abstractmethod
    def add_(self, buffer: Tensor, index: int) -> None:
        """Add the gradient of one example to a tensor of the parameter's shape."""

    def add_squares_(self, score: Tensor) -> None:
        """Add Σ_b G_b², one example at a time in one buffer."""
        add_squares_of_sums_([self], score)


def add_squares_of_sums_(parts: Sequence[ExampleGradients], score: Tensor) -> None:
    """Add Σ_b (Σ_u G_ub)²: a parameter used several times has one gradient, the sum over its uses."""
    buffer = torch.empty_like(score)
    for index in range(parts[0].num_examples):
        buffer.zero_()
        for part in parts:
            part.add_(buffer, index)
        score.addcmul_(buffer, buffer)


class Dense(ExampleGradients):
    """G as it is: values [B, *shape]. For small parameters: biases, norms."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.num_examples, self.shape = len(values), values.shape[1:]

    def add_(self, buffer: Tensor, index: int) -> None:
        buffer.add_(self.values[index])

    def add_squares_(self, score: Tensor) -> None:
        score.add_(self.values.square().sum(0))


class Outer(ExampleGradients):
    """G_b = Σ_t left_btᵀ right_bt: ``einsum('bto,bti->boi', left, right)``, never formed for all B.

    One term collapses to ``einsum('bo,bi->oi', left², right²)``; for more there is no shortcut to the squares.
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left, self.right = left, right
        self.num_examples, self.shape = len(left), torch.Size((left.shape[2], right.shape[2]))

    def add_(self, buffer: Tensor, index: int) -> None:
        buffer.addmm_(self.left[index].T, self.right[index])

    def add_squares_(self, score: Tensor) -> None:
        left, right = _without_trailing_zeros(self.left, self.right)
        if left.shape[1] == 1:
            score.addmm_(left[:, 0].square().T, right[:, 0].square())
            return
        if _in_registers_(score, left, right):
            return
        size = max(1, min(_TOGETHER, _CACHED // max(score.numel(), 1)))
        buffer = score.new_empty(min(size, len(left)), *score.shape)
        for left_some, right_some in zip(left.split(size), right.split(size), strict=True):
            some = torch.bmm(left_some.transpose(1, 2), right_some, out=buffer[: len(left_some)])
            for gradient in some:
                score.addcmul_(gradient, gradient)


def _in_registers_(score: Tensor, left: Tensor, right: Tensor) -> bool:
    """Add Σ_b (left_bᵀ right_b)² by the compiled kernel, which writes no product; tell whether it can."""
    tensors = score, left, right
    if (
        LIBRARY is None
        or not LIBRARY.ct_adds_squares()
        or left.numel() * right.shape[2] < _SMALL
        or not all(t.is_cpu and t.dtype is torch.float32 and t.layout is torch.strided for t in tensors)
        or not score.is_contiguous()
    ):
        return False
    num_threads, num_examples = torch.get_num_threads(), max(1, _TERMS // left.shape[1])
    num_rows = min(_ROWS, -(-len(score) // (num_threads * _TILE)) * _TILE)
    for some in zip(left.split(num_examples), right.split(num_examples), strict=True):
        left, right = (t if t.stride(2) == 1 else t.contiguous() for t in some)
        B, T, I = right.shape
        rooms = score.new_empty(num_threads, (B * T + _WIDTH) * num_rows + T * _WIDTH)
        numbers = (I, *left.stride()[:2], *right.stride()[:2])
        tasks = [
            (left.data_ptr() + 4 * first, right.data_ptr(), score[first].data_ptr(), 0, B, T, count, *numbers)
            for first, count in cut(len(score), num_rows)
        ]
        for wave in np.split(np.array(tasks, PRODUCTS), range(num_threads, len(tasks), num_threads)):
            wave["room"] = [room.data_ptr() for room in rooms[: len(wave)]]
            run_tasks("ct_add_squares", wave)
    return True


def _without_trailing_zeros(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Cut the terms after the last one that counts: padding, and above the pooled token all but that one."""
    if left.is_cuda or left.shape[1] < 2:  # on a GPU, waiting for the answer costs more than it saves
        return left, right
    length = min(_last_used(left), _last_used(right)) + 1
    if not bool((left[:, length:].sum() + right[:, length:].sum()).isfinite()):
        return left, right  # zero times what is not finite is no zero
    return left[:, :length], right[:, :length]


def _last_used(terms: Tensor) -> int:
    """Return the last term [B, T, …] that is not zero in every example."""
    last = terms.shape[1] - 1
    if bool(terms[:, last].any()):  # the usual case, found without a pass over all terms
        return last
    used = (terms.amax((0, 2)).ne(0) | terms.amin((0, 2)).ne(0)).nonzero()
    return int(used[-1]) if len(used) else 0


class Rows(ExampleGradients):
    """G_b[v] = Σ_{t: ids_bt = v} values_bt: ``einsum('btv,btd->bvd', onehot(ids), values)``.

    Only the rows in use are touched. ids [B, T], values [B, T, D]; terms with the id ``skip`` have no gradient.
    """

    def __init__(self, ids: Tensor, values: Tensor, num_rows: int, skip: int | None = None) -> None:
        self.ids, self.values, self.skip = ids, values, skip
        self.num_examples, self.shape = len(ids), torch.Size((num_rows, values.shape[2]))

    def add_(self, buffer: Tensor, index: int) -> None:
        ids, values = self.ids[index], self.values[index]
        if self.skip is not None:
            ids, values = ids[ids != self.skip], values[ids != self.skip]
        buffer.index_add_(0, ids, values)

    def add_squares_(self, score: Tensor) -> None:
        num_rows = self.shape[0]
        first = torch.arange(self.num_examples, device=self.ids.device).unsqueeze(1) * num_rows
        keys, values = (first + self.ids).flatten(), self.values.flatten(0, 1)
        if self.skip is not None:
            kept = self.ids.flatten() != self.skip
            keys, values = keys[kept], values[kept]
        keys, where = keys.unique(return_inverse=True)
        sums = values.new_zeros(len(keys), values.shape[1]).index_add_(0, where, values)
        score.index_add_(0, keys % num_rows, sums.square_())


class Computed(ExampleGradients):
    """G_b = compute(b): for layers whose gradient torch knows how to take, one example at a time."""

    def __init__(self, compute: Callable[[int], Tensor], num_examples: int, shape: torch.Size) -> None:
        self.compute, self.num_examples, self.shape = compute, num_examples, shape

    def add_(self, buffer: Tensor, index: int) -> None:
        buffer.add_(self.compute(index))

    def add_squares_(self, score: Tensor) -> None:
        for index in range(self.num_examples):
            gradient = self.compute(index)
            score.addcmul_(gradient, gradient)
