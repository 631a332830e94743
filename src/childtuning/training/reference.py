"""The base model as a reference for DPO and KL, without a second copy: a fixed child's base values, swapped in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from childtuning.child import Child
from childtuning.child.eligible import named
from childtuning.child.pieces import reshard
from childtuning.delta.switch import Held
from childtuning.errors import ConfigError


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
        shapes = {name: parameter.shape for name, parameter in named(model, sharded=True).items()}
        self._base = Held(model, child.resolve(shapes))

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
        model = self._model[0]
        reshard(model)
        parameters = named(model, sharded=True)
        with _unsafe_preserve_version_counter(tuple(self._base.tensors(model, parameters))):
            self._base.exchange_(model, parameters)
            try:
                yield
            finally:
                reshard(model)
                self._base.exchange_(model, parameters)
