"""The masked step: every parameter is optimised, under a gradient that is masked first."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

MaskFn = Callable[[str, int], Tensor | None]


class MaskedStep:
    """Multiply gradients with masks before the inner optimizer sees them.

    Args:
        named: the trained parameters, by name before any wrapper.
        mask_fn: ``mask_fn(name, step) -> bool mask`` of the parameter's shape, or ``None`` for no mask.
        scale: what a masked gradient is multiplied with (1/p, or 1).
    """

    def __init__(self, named: dict[str, nn.Parameter], mask_fn: MaskFn, scale: float) -> None:
        self._named = named
        self._mask_fn = mask_fn
        self._scale = scale

    def gradients(self) -> list[Tensor]:
        """Return the gradients as they are, unmasked."""
        return [p.grad for p in self._named.values() if p.grad is not None]

    @torch.no_grad()
    def before_inner(self, step: int) -> None:
        """Mask every gradient for this step."""
        for name, parameter in self._named.items():
            gradient = parameter.grad
            mask = None if gradient is None else self._mask_fn(name, step)
            if gradient is None or mask is None:
                continue
            gradient.mul_(mask.to(gradient.device))
            if self._scale != 1.0:
                gradient.mul_(self._scale)
