"""Move chosen entries between a parameter and a compact tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def gather(source: Tensor, indices: Tensor, out: Tensor) -> Tensor:
    """Write ``source.flatten()[indices]`` into out.

    Args:
        source: a tensor of any shape and layout; a sparse gradient is made dense.
        indices: int32 or int64 [n], flat, on source's device.
        out: [n], contiguous, any floating dtype; converted on the way if it differs from source's.
    Returns:
        out.
    """
    flat = (source.to_dense() if source.is_sparse else source).reshape(-1)
    if source.dtype == out.dtype:
        return torch.index_select(flat, 0, indices, out=out)
    return out.copy_(torch.index_select(flat, 0, indices))


def scatter_(target: Tensor, indices: Tensor, values: Tensor) -> None:
    """Write values into ``target.flatten()[indices]`` in place; every other entry keeps its bits.

    Args:
        target: a dense tensor of any shape and layout.
        indices: int32 or int64 [n], flat, without repeats, on target's device.
        values: [n]; rounded to target's dtype.
    """
    values = values.to(target.dtype)
    if target.is_contiguous():
        target.view(-1)[indices] = values
        return
    flat = target.contiguous().view(-1)
    flat[indices] = values
    target.copy_(flat.view(target.shape))
