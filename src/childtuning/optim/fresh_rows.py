"""Task-free rows whose gradients alone are formed: a fresh child each step that saves computation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from childtuning.granularity import Granularity
from childtuning.optim.fresh_masks import FreshMasks
from childtuning.structured import Installed, Trained, install


@dataclass
class _Drawn:
    """One parameter's rows at the present step."""

    parameter: nn.Parameter
    units: Granularity
    trained: Trained
    rows: Tensor  # int64 [r], increasing


class FreshRows:
    """Draws rows for the coming step and lets the model's layers form the gradients of those alone.

    The rows are drawn once a step, before its forward passes, so that accumulated batches share them.

    Args:
        masks: the draw.
        named: the trained parameters, by name before any wrapper.
        model: that they belong to.
    """

    def __init__(self, masks: FreshMasks, named: Mapping[str, nn.Parameter], model: nn.Module) -> None:
        self.free = masks.free
        self._masks, self._named, self._model = masks, named, model
        self._drawn: dict[str, _Drawn] = {}
        self._installed: Installed | None = None
        self.attach()

    @property
    def attached(self) -> bool:
        """Whether the model's layers form the drawn rows' gradients alone."""
        return self._installed is not None

    def attach(self) -> None:
        """Put the layers into the model; a second call does nothing. The rows are still to be drawn."""
        if self.attached:
            return
        named = self._named
        names_in_model = {id(p): name for name, p in self._model.named_parameters()}
        candidates: dict[str, str] = {}
        for name, parameter in named.items():
            in_model = names_in_model.get(id(parameter))
            is_row = self.free.units(name).kind == "row" and parameter.dim() > 1
            if is_row and self._masks.covers(name) and in_model is not None:
                candidates[in_model] = name
        trained = {in_model: Trained([], _leaf(named[name], 0)) for in_model, name in candidates.items()}
        self._installed = install(self._model, trained)
        for in_model in self._installed.names:
            name = candidates[in_model]
            self._drawn[name] = _Drawn(
                named[name], self.free.units(name), trained[in_model], torch.zeros(0, dtype=torch.int64)
            )

    def __contains__(self, name: str) -> bool:
        """Tell whether a parameter's gradient is formed for its drawn rows alone."""
        return name in self._drawn

    def draw(self, step: int) -> None:
        """Draw the rows of a step; what was gathered for another is dropped."""
        for name, drawn in self._drawn.items():
            shape, device = drawn.parameter.shape, drawn.parameter.device
            drawn.rows = self.free.kept_units(name, shape, step).nonzero().squeeze(1).to(device)
            axis = drawn.units.axis % len(shape)
            drawn.trained.groups = [(drawn.rows, None) if axis == 0 else (None, drawn.rows)]
            size = len(drawn.rows) * (drawn.parameter.numel() // max(shape[axis], 1))
            drawn.trained.leaf = _leaf(drawn.parameter, size)

    def gradients(self) -> list[Tensor]:
        """Return what has been formed, unscaled, each flat."""
        found = [_whole_gradient(drawn) for drawn in self._drawn.values()]
        return [gradient for gradient in found if gradient is not None]

    def take(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return a parameter's drawn rows [r] and their gradient, or ``None`` if the loss did not reach them.

        The gradient has the parameter's shape but for r rows. Where no row was drawn, the loss counts as having
        reached the parameter, whose momentum then moves it as in any other step.
        """
        drawn = self._drawn[name]
        gradient = _whole_gradient(drawn)
        if gradient is None and len(drawn.rows):
            return None
        if gradient is None:
            gradient = drawn.parameter.detach().reshape(-1)[:0]
        shape = list(drawn.parameter.shape)
        shape[drawn.units.axis % len(shape)] = len(drawn.rows)
        return drawn.rows, gradient.view(shape)

    def spread(self, name: str, rows: Tensor, gradient: Tensor) -> Tensor:
        """Return the dense gradient: zero outside the rows."""
        drawn = self._drawn[name]
        dense = torch.zeros_like(drawn.parameter)
        return dense.index_copy_(drawn.units.axis % dense.dim(), rows, gradient.to(dense.dtype))

    def clear(self) -> None:
        """Forget gradients that were formed, and keep the rows."""
        for drawn in self._drawn.values():
            drawn.trained.leaf.grad = None

    def remove(self) -> None:
        """Let the model's layers form dense gradients again; a second call does nothing."""
        if self._installed is not None:
            self._installed.remove()
            self._installed = None
            self._drawn.clear()


def _whole_gradient(drawn: _Drawn) -> Tensor | None:
    """The drawn rows' gradient, what came about elsewhere than in structured layers included."""
    dense, leaf = drawn.parameter.grad, drawn.trained.leaf
    if dense is not None:
        axis = drawn.units.axis % dense.dim()
        rows = dense.to_dense() if dense.is_sparse else dense
        rows = rows.index_select(axis, drawn.rows).reshape(-1)
        leaf.grad = rows if leaf.grad is None else leaf.grad + rows
        drawn.parameter.grad = None
    return leaf.grad


def _leaf(parameter: nn.Parameter, size: int) -> Tensor:
    one = torch.empty(1, dtype=parameter.dtype, device=parameter.device)
    return one.expand(size).requires_grad_()
