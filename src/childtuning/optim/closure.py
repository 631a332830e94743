"""The closures that optimizers' steps take."""

from __future__ import annotations

from collections.abc import Callable

import torch


def evaluated(closure: Callable[[], float] | None) -> float | None:
    """Return the loss of a step's closure, with gradients on, or ``None`` where there is none."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
