"""Adam and AdamW in one pass over memory: gradient in, weight and moments out.

    m ← m + (1−β1)·(s·g − m),   v ← β2·v + (1−β2)·(s·g)²
    w ← (1 − lr·λ)·w − lr/(1−β1ᵗ) · m / (√v/√(1−β2ᵗ) + ε)        [Loshchilov and Hutter 2019]

with s the gradient's scale (1/p) and, task-free, g masked first. It is ``torch.optim.AdamW``'s update to float32
rounding, or ``Adam``'s where the decay λ is added to the gradient instead. A call works on many parameters at once: on
the CPU they are cut into tasks that threads take from a queue, on a GPU they are one launch (``fast/gpu.py``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from childtuning.fast import gpu, library
from childtuning.fast.library import MASKED, ROWS, STRETCH, AdamWStep, MaskDraw, Member, run_tasks
from childtuning.fast.runs import Runs, cut

_ENTRIES_A_TASK = 1 << 16
_BYTES = 4  # an entry's
_NOBODY = (0, 0, 0, 0, 0)
_OTHER_UPDATES = ("amsgrad", "capturable", "differentiable")
_T = TypeVar("_T")


def supports(inner: type[torch.optim.Optimizer], options: Mapping[str, Any]) -> bool:
    """Tell whether the kernels know an optimizer's update under these options."""
    return inner in (torch.optim.Adam, torch.optim.AdamW) and not any(
        options.get(name) for name in _OTHER_UPDATES
    )


def fits(*tensors: Tensor) -> bool:
    """Tell whether the kernels can work on these tensors, which are on one device."""
    return library.fits(*tensors) or gpu.fits(*tensors)


class ChildTable:
    """Updates the entries of a fixed child in several parameters on one device.

    Args:
        runs: for each parameter where its trained entries lie; the starts are int32.
    """

    def __init__(self, runs: Sequence[Runs]) -> None:
        self._runs = [one.once() if one.starts.is_cuda else one for one in runs]
        rows = [(owner, *row) for owner, one in enumerate(runs) for row in one.stretches(_ENTRIES_A_TASK)]
        columns = np.array(rows, np.int64).reshape(-1, 8).T
        self._owner, self._offset, self._at = columns[0], _BYTES * columns[1], _BYTES * columns[2]
        self._tasks = np.zeros(len(rows), STRETCH)
        for name, column in zip(("index", "count", "width", "repeats", "period"), columns[3:], strict=True):
            self._tasks[name] = column

    def __reduce__(self) -> tuple[type[ChildTable], tuple[list[Runs]]]:
        """Copy as a table of the copied starts: the tasks hold addresses."""
        return type(self), (self._runs,)

    def step_(self, members: Sequence[Member | None]) -> None:
        """Update the entries in place, and nothing else; ``None`` leaves a parameter as it is."""
        present = [member for member in members if member is not None]
        if present and present[0].weight.is_cuda:
            gpu.child_(self._runs, members)
        else:
            for step in {id(member.step): member.step for member in present}.values():
                self._on_cpu([m if m is not None and m.step is step else None for m in members], step)
        increment_version([member.weight for member in present])

    def _on_cpu(self, members: Sequence[Member | None], step: AdamWStep) -> None:
        rows = np.array([_NOBODY if m is None else _row(m) for m in members], np.int64)
        chosen = rows[:, 0][self._owner] != 0
        offset, at, tasks = self._offset[chosen], self._at[chosen], self._tasks[chosen]
        tasks["weight"], tasks["gradient"], tasks["first"], tasks["second"], compact = rows[
            self._owner[chosen]
        ].T
        tasks["weight"] += at.astype(np.uintp)
        tasks["gradient"] += np.where(compact, offset, at).astype(np.uintp)
        tasks["first"] += offset.astype(np.uintp)
        tasks["second"] += offset.astype(np.uintp)
        tasks["compact_gradient"] = compact
        numbers = step.numbers()
        tasks["numbers"] = numbers.ctypes.data
        run_tasks("ct_adamw_stretch", tasks)


def masked_(members: Sequence[tuple[Member, MaskDraw]]) -> None:
    """Update whole parameters under masks of single entries that are drawn on the way; gradients are not written to."""
    _by_device(members, _masked_cpu_, gpu.masked_)


def rows_(members: Sequence[tuple[Member, Tensor]]) -> None:
    """Update whole parameters [R, …] when only some rows have a gradient.

    Args:
        members: a parameter, and int32 place [R]: row r has the gradient ``gradient[place[r]]``, or none if negative.
    """
    _by_device(members, _rows_cpu_, gpu.rows_)


def _by_device(
    members: Sequence[tuple[Member, _T]],
    on_cpu: Callable[[Sequence[tuple[Member, _T]]], None],
    on_gpu: Callable[[Sequence[tuple[Member, _T]]], None],
) -> None:
    """Run each kernel on the members of its device, and bump the version counters, which kernels do not."""
    for kernel, is_cuda in ((on_gpu, True), (on_cpu, False)):
        if there := [pair for pair in members if pair[0].weight.is_cuda is is_cuda]:
            kernel(there)
    increment_version([member.weight for member, _ in members])


def _masked_cpu_(members: Sequence[tuple[Member, MaskDraw]]) -> None:
    numbers = [member.step.numbers() for member, _ in members]
    draws = [draw.native() for _, draw in members]
    rows = [
        (*_row(member)[:4], start, size, mask.start, ctypes.addressof(draw), number.ctypes.data)
        for (member, mask), draw, number in zip(members, draws, numbers, strict=True)
        for start, size in cut(member.weight.numel(), _ENTRIES_A_TASK)
    ]
    run_tasks("ct_adamw_masked", np.array(rows, MASKED))


def _rows_cpu_(members: Sequence[tuple[Member, Tensor]]) -> None:
    numbers = [member.step.numbers() for member, _ in members]
    rows = []
    for (member, place), number in zip(members, numbers, strict=True):
        width = member.weight[0].numel()
        for start, size in cut(len(member.weight), max(1, _ENTRIES_A_TASK // max(width, 1))):
            rows.append((*_row(member)[:4], start, size, width, place.data_ptr(), number.ctypes.data))
    run_tasks("ct_adamw_rows", np.array(rows, ROWS))


def _row(member: Member) -> tuple[int, ...]:
    """Where a member's four tensors lie, and whether the gradient is compact."""
    weight, gradient, first, second, _, _ = member
    is_compact = gradient.numel() < weight.numel()
    return weight.data_ptr(), gradient.data_ptr(), first.data_ptr(), second.data_ptr(), is_compact
