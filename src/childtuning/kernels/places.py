"""Where a parameter's trained entries lie in it, and moving them to and from compact tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from childtuning.kernels.native_library import LIBRARY


@dataclass(frozen=True, eq=False)
class Places:
    """Units of ``width`` entries that lie together: unit u holds the flat indices u·width … u·width + width − 1.

    Args:
        units: int32 (int64 for parameters of 2^31 entries or more) [n], increasing, on the parameter's device.
        width: entries in a unit; 1 for single entries.
    """

    units: Tensor
    width: int = 1

    def __len__(self) -> int:
        """Count the entries."""
        return len(self.units) * self.width

    def to(self, device: torch.device) -> Places:
        """Return the same places with the units on a device."""
        return Places(self.units.to(device), self.width)

    def gather(self, source: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
        """Write the entries of source into out, or add them to what is there.

        Args:
            source: a tensor of the parameter's shape, any layout; a sparse gradient is made dense.
            out: [n · width], contiguous, any floating dtype; converted on the way if it differs from source's.
        Returns:
            out.
        """
        flat = (source.to_dense() if source.is_sparse else source).reshape(-1, self.width)
        target = out.view(-1, self.width)
        if add:
            target.add_(flat.index_select(0, self.units))
        elif source.dtype == out.dtype:
            torch.index_select(flat, 0, self.units, out=target)
        else:
            target.copy_(flat.index_select(0, self.units))
        return out

    def scatter_(self, target: Tensor, values: Tensor) -> None:
        """Write values [n · width], rounded to target's dtype, in place; every other entry keeps its bits."""
        values = values.to(target.dtype).view(-1, self.width)
        if target.is_contiguous():
            target.view(-1, self.width)[self.units] = values
            return
        flat = target.contiguous().view(-1, self.width)
        flat[self.units] = values
        target.copy_(flat.view(target.shape))


def fits_kernels(*tensors: Tensor) -> bool:
    """Tell whether the compiled kernels are there and these are contiguous float32 tensors on the CPU."""
    return LIBRARY is not None and all(
        t.dtype == torch.float32
        and t.device.type == "cpu"
        and t.layout == torch.strided
        and t.is_contiguous()
        for t in tensors
    )
