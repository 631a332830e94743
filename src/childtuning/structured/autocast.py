"""Mixed precision: what torch casts inside an operator, a layer of ours has to cast before it stores."""

from __future__ import annotations

import torch
from torch import Tensor


def lowered(x: Tensor) -> Tensor:
    """Return x as ``torch.autocast`` would hand it to a matrix product here."""
    device = x.device.type
    if not x.is_floating_point() or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))
