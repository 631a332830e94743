"""The masked step: every parameter is optimised, under a gradient that is masked first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from childtuning.kernels import (
    MaskDraw,
    WholeTensors,
    adamw_masked_,
    adamw_rows_,
    fits_kernels,
    mask_scale_,
)
from childtuning.optim.fused_adamw import next_step
from childtuning.part import Part
from childtuning.task_free import TaskFree


class FixedMasks:
    """The same masks at every step: the official code's task-driven child."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self._parts = {name: part for name, part in parts.items() if not part.is_whole}

    def mask(self, name: str, step: int) -> Tensor | None:
        """Return the part's mask."""
        return self._parts[name].mask() if name in self._parts else None


class FreshMasks:
    """A fresh mask at every step, on all parameters but those exempt."""

    def __init__(self, free: TaskFree, shapes: Mapping[str, Sequence[int]], exempt: set[str]) -> None:
        self.free, self._shapes, self._exempt = free, dict(shapes), exempt

    def covers(self, name: str) -> bool:
        """Tell whether a parameter is masked at all."""
        return name not in self._exempt and self.free.density < 1

    def mask(self, name: str, step: int) -> Tensor | None:
        """Draw the parameter's mask."""
        return self.free.mask(name, self._shapes[name], step) if self.covers(name) else None


class MaskedStep:
    """Mask gradients on their way to the inner optimizer.

    With Adam and AdamW in float32 on the CPU mask, moments and update are one pass over memory, for single entries
    and for rows; the gradients are only read. Otherwise gradients are masked in place.

    Args:
        groups: for each parameter group the trained parameters, by name before any wrapper.
        masks: on them.
        scale: what a masked gradient is multiplied with (1/p, or 1).
        can_fuse: for each group, whether the kernels know the inner optimizer's update.
    """

    def __init__(
        self,
        groups: list[dict[str, nn.Parameter]],
        masks: FixedMasks | FreshMasks,
        scale: float,
        *,
        can_fuse: Sequence[bool],
    ) -> None:
        self._groups = groups
        self._masks = masks
        self._scale = scale
        self._can_fuse = can_fuse

    def gradients(self) -> list[Tensor]:
        """Return the gradients as they are, unmasked."""
        return [p.grad for group in self._groups for p in group.values() if p.grad is not None]

    @torch.no_grad()
    def run(self, inner: Optimizer, step: int) -> None:
        """Update every parameter by one step of the inner optimizer, under this step's masks."""
        by_entry: list[tuple[WholeTensors, MaskDraw]] = []
        by_row: list[tuple[WholeTensors, Tensor]] = []
        hidden: list[tuple[nn.Parameter, Tensor]] = []
        for named, group, fuse in zip(self._groups, inner.param_groups, self._can_fuse, strict=True):
            for name, parameter in named.items():
                gradient = parameter.grad
                if gradient is None:
                    continue
                unit = self._kernel_unit(name, parameter, gradient) if fuse else None
                if unit is None:
                    self._mask_(name, gradient, step)
                    continue
                numbers, first, second = next_step(inner, group, parameter, parameter.shape, self._scale)
                tensors = WholeTensors(parameter, gradient, first, second, numbers)
                if unit == "row":
                    by_row.append((tensors, self._row_places(name, parameter, step)))
                else:
                    by_entry.append((tensors, self._draw(name, step)))
                hidden.append((parameter, gradient))
        if by_entry:
            adamw_masked_(by_entry)
        if by_row:
            adamw_rows_(by_row)
        try:
            for parameter, _ in hidden:
                parameter.grad = None
            inner.step()
        finally:
            for parameter, gradient in hidden:
                parameter.grad = gradient

    def _kernel_unit(self, name: str, parameter: nn.Parameter, gradient: Tensor) -> str | None:
        """Say in which units the kernels can draw a parameter's mask: "element", "row", or ``None``."""
        if not isinstance(self._masks, FreshMasks) or not self._masks.covers(name):
            return None
        if not parameter.numel() or not fits_kernels(parameter, gradient):
            return None
        units = self._masks.free.units(name)
        if units.kind == "element" or (units.kind == "row" and parameter.dim() < 2):
            return "element"
        return "row" if units.is_run(parameter.shape) else None

    def _draw(self, name: str, step: int) -> MaskDraw:
        assert isinstance(self._masks, FreshMasks)
        draw = self._masks.free.draw(name, step)
        assert draw is not None  # a density below 1 keeps not everything
        return draw

    def _row_places(self, name: str, parameter: nn.Parameter, step: int) -> Tensor:
        assert isinstance(self._masks, FreshMasks)
        kept = self._masks.free.kept_units(name, parameter.shape, step)
        return torch.where(kept, torch.arange(len(kept), dtype=torch.int32), -1)

    def _mask_(self, name: str, gradient: Tensor, step: int) -> None:
        """Mask and scale a gradient in place."""
        masks = self._masks
        if isinstance(masks, FreshMasks) and masks.covers(name) and fits_kernels(gradient):
            units = masks.free.units(name)
            draw = masks.free.draw(name, step)
            if units.kind == "element" and draw is not None:
                mask_scale_(gradient, draw, self._scale)
                return
        mask = masks.mask(name, step)
        if mask is None:
            return
        gradient.mul_(mask.to(gradient.device))
        if self._scale != 1.0:
            gradient.mul_(self._scale)
