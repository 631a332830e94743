"""Exchange of some entries of tensors for other values: what was there is kept for the way back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from childtuning import fast
from childtuning.fast.library import ENTRIES, LIBRARY, run_tasks
from childtuning.fast.runs import Runs

_BYTES_A_TASK = 1 << 18


def exchange_(
    members: Sequence[tuple[Runs | None, Tensor, Tensor]], *, in_place: bool = False
) -> list[Tensor]:
    """Write values into tensors, in place, and return what was there.

    Args:
        members: which entries of a tensor (``None``: all), the tensor, which shares no memory with another one, and
            their values, [num_entries] or of the tensor's shape, of its dtype.
        in_place: return the tensors of values, with what was there in them.
    Returns:
        for each the values that were there, like those that were written: on their device.
    """
    found: list[Tensor] = []
    is_fast = LIBRARY is not None and fast.enabled()
    tasks: list[tuple[int, ...]] = []
    for runs, tensor, values in members:
        if runs is None:
            before = tensor.reshape(-1).clone()
            tensor.copy_(values.view_as(tensor))
        elif not (is_fast and _fits(runs, tensor, values)):
            runs = runs.to(tensor.device)
            before = runs.gather(tensor)
            runs.scatter_(tensor, values.to(tensor.device))
        else:
            before, size = values if in_place else torch.empty_like(values), tensor.element_size()
            for own, at, index, count, width, repeats, period in runs.stretches(_BYTES_A_TASK // size):
                where = tensor.data_ptr() + size * at, values.data_ptr() + size * own
                shape = count, size * width, repeats, size * period, size * width * count
                tasks.append((*where, before.data_ptr() + size * own, index, *shape))
        if in_place and before is not values:
            before = values.copy_(before.view_as(values))
        found.append(before.to(values.device))
    if tasks:
        run_tasks("ct_exchange", np.array(tasks, ENTRIES))
        increment_version([tensor for runs, tensor, _ in members if runs is not None])
    return found


def _fits(runs: Runs, tensor: Tensor, values: Tensor) -> bool:
    return (
        tensor.dtype is values.dtype
        and runs.starts.dtype is torch.int32
        and all(t.is_cpu and t.layout is torch.strided and t.is_contiguous() for t in (tensor, values))
    )
