"""The masked step: every parameter is optimised, under a gradient that is masked first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from childtuning.kernels import (
    MaskDraw,
    WholeTensors,
    adamw_masked_,
    adamw_rows_,
    has_kernels,
    mask_scale_,
)
from childtuning.optim.fresh_masks import FixedMasks, FreshMasks
from childtuning.optim.fresh_rows import FreshRows
from childtuning.optim.fused_adamw import fits_state, hand_over, next_step


@dataclass
class _Tasks:
    """What the kernels are to do in a step, and which gradients parameters are to have when it is over."""

    by_entry: list[tuple[WholeTensors, MaskDraw]] = field(default_factory=list)
    by_row: list[tuple[WholeTensors, Tensor]] = field(default_factory=list)
    after: list[tuple[nn.Parameter, Tensor | None]] = field(default_factory=list)


class MaskedStep:
    """Mask gradients on their way to the inner optimizer.

    With Adam and AdamW, in float32 on the CPU and on a GPU, mask, moments and update are one pass over memory, for
    single entries and for rows; the gradients are only read. Otherwise gradients are masked in place.

    Args:
        groups: for each parameter group the trained parameters, by name before any wrapper.
        masks: on them.
        scale: what a masked gradient is multiplied with (1/p, or 1).
        can_fuse: for each group, whether the kernels know the inner optimizer's update.
        rows: the parameters of which only this step's rows have a gradient, if there are any.
    """

    def __init__(
        self,
        groups: list[dict[str, nn.Parameter]],
        masks: FixedMasks | FreshMasks,
        scale: float,
        *,
        can_fuse: Sequence[bool],
        rows: FreshRows | None = None,
    ) -> None:
        self._groups = groups
        self._masks = masks
        self._scale = scale
        self._can_fuse = can_fuse
        self._rows = rows
        self.draw(0)

    def trained(self) -> Iterator[tuple[nn.Parameter, None]]:
        """Iterate over the parameters, each of which is trained whole in the course of time."""
        for named in self._groups:
            yield from ((parameter, None) for parameter in named.values())

    def gradients(self) -> list[Tensor]:
        """Return the gradients as they are, unmasked, but for those of which only some rows were formed."""
        return [
            p.grad
            for named in self._groups
            for name, p in named.items()
            if p.grad is not None and not self._has_rows(name)
        ]

    def sampled_gradients(self) -> tuple[list[Tensor], float]:
        """Return the gradients of which a random share was formed, and that share."""
        return ([], 1.0) if self._rows is None else (self._rows.gradients(), self._rows.free.density)

    def draw(self, step: int) -> None:
        """Make ready for the forward passes of a step."""
        if self._rows is not None:
            self._rows.draw(step)

    def zero_grad(self) -> None:
        """Forget gradients that lie elsewhere than in the parameters."""
        if self._rows is not None:
            self._rows.clear()

    def _has_rows(self, name: str) -> bool:
        return self._rows is not None and name in self._rows

    @torch.no_grad()
    def run(self, inner: Optimizer, step: int) -> None:
        """Update every parameter by one step of the inner optimizer, under this step's masks."""
        tasks = _Tasks()
        try:
            for named, group, fuse in zip(self._groups, inner.param_groups, self._can_fuse, strict=True):
                for name, parameter in named.items():
                    self._plan(tasks, inner, group, name, parameter, step, fuse=fuse)
            if tasks.by_entry:
                adamw_masked_(tasks.by_entry)
            if tasks.by_row:
                adamw_rows_(tasks.by_row)
            inner.step()
        finally:
            for parameter, gradient in tasks.after:
                parameter.grad = gradient
        self.draw(step + 1)

    def _plan(
        self,
        tasks: _Tasks,
        inner: Optimizer,
        group: Mapping[str, Any],
        name: str,
        parameter: nn.Parameter,
        step: int,
        *,
        fuse: bool,
    ) -> None:
        """Leave a parameter to the kernels, or make its gradient ready for the inner optimizer."""
        gradient = parameter.grad
        if self._has_rows(name):
            self._plan_drawn_rows(tasks, inner, group, name, parameter, fuse=fuse)
        elif gradient is not None and not (
            fuse and self._plan_fused(tasks, inner, group, name, parameter, gradient, step)
        ):
            hand_over(inner, group, parameter)
            self._mask_(name, gradient, step)

    def _plan_fused(
        self,
        tasks: _Tasks,
        inner: Optimizer,
        group: Mapping[str, Any],
        name: str,
        parameter: nn.Parameter,
        gradient: Tensor,
        step: int,
    ) -> bool:
        """Leave a parameter's whole update to the kernels and hide its gradient, or return False."""
        masks, shape = self._masks, parameter.shape
        if not isinstance(masks, FreshMasks) or not masks.covers(name) or not parameter.numel():
            return False
        units = masks.free.units(name)
        by_entry = units.kind == "element" or (units.kind == "row" and len(shape) < 2)
        if not (by_entry or units.is_run(shape)) or gradient.shape != shape:
            return False
        if not (has_kernels(parameter, gradient) and fits_state(inner, parameter)):
            return False
        numbers, first, second = next_step(inner, group, parameter, shape, self._scale)
        tensors = WholeTensors(parameter, gradient, first, second, numbers)
        if by_entry:
            draw = masks.free.draw(name, step)
            assert draw is not None  # a density below 1 does not keep everything
            tasks.by_entry.append((tensors, draw))
        else:
            kept = masks.free.kept_units(name, shape, step)
            rows = torch.arange(len(kept), dtype=torch.int32)
            tasks.by_row.append((tensors, torch.where(kept, rows, -1)))
        parameter.grad = None
        tasks.after.append((parameter, gradient))
        return True

    def _plan_drawn_rows(
        self,
        tasks: _Tasks,
        inner: Optimizer,
        group: Mapping[str, Any],
        name: str,
        parameter: nn.Parameter,
        *,
        fuse: bool,
    ) -> None:
        """Leave a parameter of which some rows have a gradient to the kernels, or spread that gradient out."""
        assert self._rows is not None
        drawn = self._rows.take(name)
        if drawn is None:
            return
        rows, gradient = drawn
        fuse = fuse and self._rows.free.units(name).is_run(parameter.shape) and parameter.numel() > 0
        if fuse and has_kernels(parameter, gradient) and fits_state(inner, parameter):
            place = torch.full((len(parameter),), -1, dtype=torch.int32, device=rows.device)
            place[rows] = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
            numbers, first, second = next_step(inner, group, parameter, parameter.shape, self._scale)
            tasks.by_row.append((WholeTensors(parameter, gradient, first, second, numbers), place))
        else:
            hand_over(inner, group, parameter)
            parameter.grad = self._rows.spread(name, rows, gradient * self._scale)
            tasks.after.append((parameter, None))

    def _mask_(self, name: str, gradient: Tensor, step: int) -> None:
        """Mask and scale a gradient in place."""
        masks = self._masks
        if isinstance(masks, FreshMasks) and masks.covers(name) and has_kernels(gradient):
            draw = masks.free.draw(name, step)
            if masks.free.units(name).kind == "element" and draw is not None:
                mask_scale_(gradient, draw, self._scale)
                return
        mask = masks.mask(name, step)
        if mask is None:
            return
        mask = mask.to(gradient.device)
        if gradient.is_sparse:
            gradient.mul_(mask)
        else:
            gradient.masked_fill_(~mask, 0.0)  # a product would let NaN through, which the kernels do not
        if self._scale != 1.0:
            gradient.mul_(self._scale)
