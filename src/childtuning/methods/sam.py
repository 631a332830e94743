"""sam: use the gradient at the nearby weights with the highest loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from childtuning.fast.runs import Runs
from childtuning.methods.checks import check_positive
from childtuning.methods.registry import register
from childtuning.training import ChildTraining, Method

_Displaced = list[tuple[nn.Parameter, Runs | None, Tensor]]


@register
@dataclass(frozen=True)
class Sam(Method):
    """Compute each batch's gradient at w + ρ·g/‖g‖ instead of at w, where g is the gradient at w.

    Only trained entries are displaced and count in ‖g‖: the entries of a fixed child, or all entries, with the
    unmasked gradient, for a task-free child. The second pass uses fresh dropout. Running statistics of normalisation
    layers and the reported loss are those of the first pass. If ‖g‖ is zero or not finite, nothing is displaced.

    Args:
        radius: ρ, above 0; typical values are 0.02 to 0.1.
    """

    name = "sam"
    summary = "use the gradient at the nearby weights with the highest loss (two passes per batch)"
    source = "Foret et al. 2021, arXiv 2010.01412"
    trains = "the child's entries"
    memory = "2n during a step; full gradients"
    part = "update"
    whole_gradients = True

    radius: float = 0.05

    def __post_init__(self) -> None:
        check_positive(self)

    def training_step(self, trainer: ChildTraining, step: Callable[[], Tensor]) -> Tensor:
        """Run the batch twice; previously accumulated gradients do not affect the displacement."""
        trained = trainer.child_optimizer.trained()
        accumulated = [parameter.grad for parameter, _ in trained]
        for parameter, _ in trained:
            parameter.grad = None
        loss = step()
        statistics = [(buffer, buffer.clone()) for buffer in _running_statistics(trainer.bare_model)]
        displaced = self._displace_(trained)
        try:
            # Restored before the second pass, not after it, since the processes average the sum.
            for (parameter, _), gradient in zip(trained, accumulated, strict=True):
                parameter.grad = gradient
            step()
        finally:
            with torch.no_grad():
                for parameter, runs, values in displaced:
                    _write_(parameter, runs, values)
                for buffer, values in statistics:
                    buffer.copy_(values)
        return loss

    @torch.no_grad()
    def _displace_(self, trained: list[tuple[nn.Parameter, Runs | None]]) -> _Displaced:
        """Move the trained entries along the gradient; return their previous values."""
        ascent: _Displaced = []
        for parameter, runs in trained:
            if parameter.grad is not None:
                ascent.append((parameter, runs, _entries(parameter.grad, runs)))
                parameter.grad = None
        norm = float(nn.utils.get_total_norm([gradient for _, _, gradient in ascent]))
        if not 0 < norm < float("inf"):
            return []
        displaced: _Displaced = []
        for parameter, runs, gradient in ascent:
            values = _entries(parameter, runs)
            _write_(parameter, runs, values + gradient.div_(norm).mul_(self.radius))
            displaced.append((parameter, runs, values))
        return displaced


def _entries(tensor: Tensor, runs: Runs | None) -> Tensor:
    """Copy the entries in these runs, or all, in at least single precision, which is lossless."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    if runs is None:
        return tensor.detach().to_dense().to(dtype, copy=True)
    return runs.gather(tensor.detach(), dtype)


def _write_(parameter: nn.Parameter, runs: Runs | None, values: Tensor) -> None:
    if runs is None:
        parameter.copy_(values)
    else:
        runs.scatter_(parameter, values)


def _running_statistics(model: nn.Module) -> list[Tensor]:
    return [
        buffer
        for module in model.modules()
        if getattr(module, "track_running_stats", False)
        for buffer in module.buffers(recurse=False)
    ]
