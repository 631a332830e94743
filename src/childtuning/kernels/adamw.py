"""AdamW for a child in one pass over memory, on the CPU.

    m ← m + (1−β1)·(s·g − m),   v ← β2·v + (1−β2)·(s·g)²
    w ← (1 − lr·λ)·w − lr/(1−β1ᵗ) · m / (√v/√(1−β2ᵗ) + ε)        [Loshchilov and Hutter 2019]

with s the gradient's scale (1/p) and, task-free, g masked first. It is ``torch.optim.AdamW``'s update to float32
rounding, or ``Adam``'s where the decay λ is added to the gradient instead. All tensors are contiguous float32 on the
CPU; a call works on many parameters at once, cut into tasks that threads take from a queue.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from childtuning.kernels.native_library import MASKED, NUMBERS, ROWS, STRETCH, run_tasks
from childtuning.kernels.philox import MaskDraw
from childtuning.kernels.places import Places

_ENTRIES_A_TASK = 1 << 16
_BYTES = 4  # an entry's


@dataclass(frozen=True)
class AdamWStep:
    """One step's hyperparameters.

    Args:
        lr, beta1, beta2, eps, weight_decay: as in the equations.
        step: t, counted from 1.
        decoupled: AdamW; else the decay is added to the gradient, as in Adam.
        scale: s; negative to maximise.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    decoupled: bool = True
    scale: float = 1.0

    def numbers(self) -> NDArray:
        """Compute in float64 what the kernels multiply with; then float32."""
        return np.array(
            (
                1 - self.lr * self.weight_decay if self.decoupled else 1.0,
                0.0 if self.decoupled else self.weight_decay,
                1 - self.beta1,
                self.beta2,
                1 - self.beta2,
                self.eps,
                self.lr / (1 - self.beta1**self.step),
                (1 - self.beta2**self.step) ** -0.5,
                self.scale,
            ),
            NUMBERS,
        )


class ChildTable:
    """A fixed child's tasks: where the entries of several parameters lie, in them and in flat compact tensors.

    Args:
        places: of each parameter's entries; they follow one another in the compact tensors.
    """

    def __init__(self, places: Sequence[Places]) -> None:
        self._keep = list(places)
        flat_starts = [0, *accumulate(len(place) for place in places)]
        rows = []
        for owner, place in enumerate(places):
            units = max(1, _ENTRIES_A_TASK // place.width)
            for first in range(0, len(place.units), units):
                pointer = place.units.data_ptr() + place.units.itemsize * first
                count = min(units, len(place.units) - first)
                offset = first * place.width
                rows.append((owner, flat_starts[owner] + offset, offset, pointer, count, place.width))
        columns = np.array(rows, np.int64).reshape(-1, 6).T
        self._owner, self._flat, self._offset = columns[:3]
        self._tasks = np.zeros(len(rows), STRETCH)
        self._tasks["index"], self._tasks["count"], self._tasks["width"] = columns[3:]

    def __reduce__(self) -> tuple[type[ChildTable], tuple[list[Places]]]:
        """Copy as a table of the copied places: the tasks hold addresses."""
        return type(self), (self._keep,)

    def adamw_(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        first: Tensor,
        second: Tensor,
        step: AdamWStep,
        values: None = None,
    ) -> None:
        """Update the child's entries in place; nothing else is written to.

        Args:
            weights: the parameters.
            gradients: of each parameter's shape, or compact [n], or ``None`` to leave the parameter as it is.
            first, second: the moments, flat.
            step: hyperparameters.
            values: master values, of which float32 weights have no need.
        """
        tasks, chosen = self._filled(gradients, first)
        tasks["weight"] = _pointers(weights)[self._owner]
        tasks["second"] = second.data_ptr() + _BYTES * self._flat
        numbers = step.numbers()
        run_tasks("ct_adamw_stretches", tasks[chosen], numbers.ctypes.data)

    def gather(self, gradients: Sequence[Tensor | None], out: Tensor, *, add: bool = False) -> None:
        """Write the child's entries of dense gradients into the flat tensor out, or add them to it."""
        tasks, chosen = self._filled(gradients, out)
        run_tasks("ct_gather_stretches", tasks[chosen], add)

    def gather_one(self, owner: int, gradient: Tensor, out: Tensor, *, add: bool = False) -> None:
        """Do the same for one parameter, which is the owner-th."""
        mine = slice(*np.searchsorted(self._owner, (owner, owner + 1)))
        tasks = self._tasks[mine].copy()
        tasks["gradient"] = gradient.data_ptr()
        tasks["first"] = out.data_ptr() + _BYTES * self._flat[mine]
        run_tasks("ct_gather_stretches", tasks, add)

    def _filled(self, gradients: Sequence[Tensor | None], first: Tensor) -> tuple[NDArray, NDArray[np.bool_]]:
        tasks = self._tasks.copy()
        compact = np.array(
            [
                gradient is not None and gradient.dim() == 1 and len(gradient) == len(place)
                for gradient, place in zip(gradients, self._keep, strict=True)
            ],
            dtype=bool,
        )[self._owner]
        tasks["gradient"] = _pointers(gradients)[self._owner] + compact * _BYTES * self._offset
        tasks["first"] = first.data_ptr() + _BYTES * self._flat
        tasks["compact_gradient"] = compact
        return tasks, np.array([gradient is not None for gradient in gradients], dtype=bool)[self._owner]


def _pointers(tensors: Sequence[Tensor | None]) -> NDArray[np.int64]:
    return np.array([0 if tensor is None else tensor.data_ptr() for tensor in tensors], np.int64)


@dataclass(frozen=True)
class WholeTensors:
    """A parameter that is updated whole.

    Args:
        weight, first, second: of the parameter's shape.
        gradient: of the parameter's shape, or the rows of it that there are.
        step: hyperparameters; the scale applies to what is kept.
    """

    weight: Tensor
    gradient: Tensor
    first: Tensor
    second: Tensor
    step: AdamWStep


def adamw_masked_(members: Sequence[tuple[WholeTensors, MaskDraw]]) -> None:
    """Update parameters under masks of single entries that are drawn on the way; gradients are not written to."""
    numbers = [tensors.step.numbers() for tensors, _ in members]
    draws = [draw.native() for _, draw in members]
    rows = [
        (*_four(tensors), start, size, ctypes.addressof(draw), number.ctypes.data)
        for (tensors, _), draw, number in zip(members, draws, numbers, strict=True)
        for start, size in _cut(tensors.weight.numel(), _ENTRIES_A_TASK)
    ]
    run_tasks("ct_adamw_masked", np.array(rows, MASKED))


def adamw_rows_(members: Sequence[tuple[WholeTensors, Tensor]]) -> None:
    """Update parameters [R, …] of which some rows have a gradient.

    Args:
        members: tensors, and int32 place [R]: row r has the gradient ``gradient[place[r]]``, or none where negative.
    """
    numbers = [tensors.step.numbers() for tensors, _ in members]
    rows = []
    for (tensors, place), number in zip(members, numbers, strict=True):
        width = tensors.weight[0].numel()
        for start, size in _cut(len(tensors.weight), max(1, _ENTRIES_A_TASK // max(width, 1))):
            rows.append((*_four(tensors), start, size, width, place.data_ptr(), number.ctypes.data))
    run_tasks("ct_adamw_rows", np.array(rows, ROWS))


def _four(tensors: WholeTensors) -> tuple[int, int, int, int]:
    return (
        tensors.weight.data_ptr(),
        tensors.gradient.data_ptr(),
        tensors.first.data_ptr(),
        tensors.second.data_ptr(),
    )


def _cut(total: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(size, total - start)) for start in range(0, total, size)]
