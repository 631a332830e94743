"""The base model as a reference for DPO and KL, without a second copy: a fixed child's base values, swapped in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from childtuning.child import Child
from childtuning.child.eligible import named
from childtuning.child.pieces import local_of, piece_of, reshard
from childtuning.errors import ConfigError
from childtuning.fast.runs import Runs


class ReferenceModel(nn.Module):
    """The model as it was when this was built, while a fixed child of it is trained.

    ``DPOTrainer(model, ref_model=ReferenceModel(model, child), …)``. A call writes the child's base values into the
    model, runs it without gradients and in ``eval()`` mode, and writes the trained values back, bitwise. It holds the
    base values of the child's entries, in place of a second model. Of a model sharded by FSDP2 each process holds its
    pieces.

    Args:
        model: before training.
        child: what will be trained of it, and nothing else.
    Raises:
        ConfigError: the child is not fixed.
    """

    def __init__(self, model: nn.Module, child: Child) -> None:
        if not isinstance(child, Child):
            raise ConfigError(
                f"a reference needs a fixed child, got {type(child).__name__}: a task-free one changes all weights. "
                "Load the base model a second time."
            )
        super().__init__()
        self._model = [model]  # no submodule: it is moved, cast and wrapped as the model that it is
        reshard(model)
        parameters = named(model, sharded=True)
        parts = child.resolve({name: p.shape for name, p in parameters.items()})
        self._base: dict[str, tuple[Runs | None, Tensor]] = {}
        for name, part in parts.items():
            if part.is_empty:
                continue
            local, here = local_of(parameters[name]).detach(), piece_of(name, parameters[name]).part(part)
            runs = None if here.is_whole else here.runs().to(local.device)
            self._base[name] = (runs, local.clone() if runs is None else runs.gather(local))

    def __getattr__(self, name: str) -> Any:
        """Return the model's attribute: trainers read its configuration and its parts."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._model[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; trainers may put another forward in place of this."""
        return self._model[0](*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base model."""
        training = [module for module in self._model[0].modules() if module.training]
        try:
            for module in training:
                module.training = False
            with torch.no_grad(), self._base_values():
                return super().__call__(*args, **kwargs)
        finally:
            for module in training:
                module.training = True

    @contextmanager
    def _base_values(self) -> Iterator[None]:
        """Write the base values in, and what was there back; for autograd nothing has changed."""
        reshard(self._model[0])
        parameters = named(self._model[0], sharded=True)
        local = {name: local_of(parameters[name]).detach() for name in self._base}
        with _unsafe_preserve_version_counter(tuple(local.values())):
            kept = {}
            for name, (runs, values) in self._base.items():
                kept[name] = local[name].clone() if runs is None else runs.gather(local[name])
                _write(local[name], runs, values)
            try:
                yield
            finally:
                reshard(self._model[0])
                for name, (runs, _) in self._base.items():
                    _write(local[name], runs, kept[name])


def _write(tensor: Tensor, runs: Runs | None, values: Tensor) -> None:
    if runs is None:
        tensor.copy_(values)
    else:
        runs.scatter_(tensor, values)
