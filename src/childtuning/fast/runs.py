"""Where some entries of a tensor lie: as runs of entries that lie together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Runs:
    """The positions of a part's entries in a tensor of the parameter's shape, as runs of equal width.

    Run u covers the flat entries starts[u]·width … (starts[u]+1)·width − 1; the same again at r·period, for
    r = 0 … repeats − 1. So the columns of a matrix need one number each.

    Args:
        starts: int32 (int64 for parameters of 2^31 entries or more) [n], increasing, on the tensors' device.
        width: entries in a run; 1 for single entries.
        repeats: how often the runs come.
        period: entries from one time to the next; 0 if they come once.
    """

    starts: Tensor
    width: int
    repeats: int = 1
    period: int = 0

    def __len__(self) -> int:
        """Count the entries."""
        return self.repeats * len(self.starts) * self.width

    @cached_property
    def end(self) -> int:
        """How many entries the tensor must have at least."""
        if not len(self):
            return 0
        return (self.repeats - 1) * self.period + (int(self.starts[-1]) + 1) * self.width

    def to(self, device: torch.device) -> Runs:
        """Return the same runs on a device."""
        return replace(self, starts=self.starts.to(device))

    def once(self) -> Runs:
        """Return the same entries as runs that come once."""
        if self.repeats == 1:
            return self
        shift = torch.arange(self.repeats, dtype=self.starts.dtype, device=self.starts.device)
        starts = shift[:, None] * (self.period // self.width) + self.starts
        return Runs(starts.reshape(-1), self.width)

    def indices(self) -> Tensor:
        """Return the flat index of each entry, increasing: int64 [repeats · n · width]."""
        device = self.starts.device
        inside = torch.arange(self.width, device=device)
        once = (self.starts.long()[:, None] * self.width + inside).reshape(-1)
        return (torch.arange(self.repeats, device=device)[:, None] * self.period + once).reshape(-1)

    def stretches(self, size: int) -> Iterator[tuple[int, ...]]:
        """Cut the entries into stretches of at most about ``size`` for compiled kernels, which read the starts.

        Yields:
            the stretch's first entry, counted among these entries; the tensor's entry from which its own positions
            count; the address of its starts, int32; how many they are; width, repeats and period.
        """
        starts, width = self.starts, self.width
        if self.repeats == 1:
            for first, count in cut(len(starts), max(1, size // width)):
                yield first * width, 0, starts.data_ptr() + starts.itemsize * first, count, width, 1, 0
            return
        once = len(starts) * width
        for first, times in cut(self.repeats if once else 0, max(1, size // max(once, 1))):
            yield (
                first * once,
                first * self.period,
                starts.data_ptr(),
                len(starts),
                width,
                times,
                self.period,
            )

    def gather(self, source: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the entries of a tensor (strided or sparse) of the parameter's shape: [repeats · n · width]."""
        flat = (source.to_dense() if source.is_sparse else source).reshape(self.repeats, -1, self.width)
        if self.repeats == 1:
            runs = flat[0] if self.width > 1 else flat.view(-1)  # torch is faster along one axis
            return runs.index_select(0, self.starts).reshape(-1).to(dtype or source.dtype)
        return flat.index_select(1, self.starts).reshape(-1).to(dtype or source.dtype)

    def scatter_(self, target: Tensor, values: Tensor) -> None:
        """Write the values of the entries, rounded to target's dtype, in place; every other entry keeps its bits."""
        values = values.to(target.dtype).view(self.repeats, -1, self.width)
        flat = target if target.is_contiguous() else target.contiguous()
        flat.view(self.repeats, -1, self.width)[:, self.starts] = values
        if flat is not target:
            target.copy_(flat)


def cut(total: int, size: int) -> list[tuple[int, int]]:
    """Cut a count into pieces of at most ``size``: first and length of each."""
    return [(start, min(size, total - start)) for start in range(0, total, size)]
