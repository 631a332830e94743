"""Tell whether an optimizer treats every coordinate on its own, by watching it work on a few numbers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from childtuning.errors import ConfigError

_REMEDY = "Use an element-wise one (AdamW, SGD, RAdam, NAdam, Adagrad, RMSprop, …), or a task-free child."
_STEPS = 3


def check_elementwise(inner: type[Optimizer], options: Mapping[str, Any]) -> None:
    """Refuse an optimizer that mixes coordinates, since the compact tensors hold a child's entries, not matrices.

    The optimizer runs a few steps on a small matrix, and again on a vector of some of that matrix's entries with the
    same gradients. One that is element-wise moves those entries alike.

    Raises:
        ConfigError: it mixes coordinates (Muon, Shampoo, LBFGS, Adafactor), or cannot run on vectors at all.
    """
    known = inspect.signature(inner).parameters
    options = {name: value for name, value in options.items() if name != "capturable"}
    if "lr" in known:  # a rate at which every difference shows
        options["lr"] = 0.01
    entries = torch.arange(1, 64, 3)
    start = torch.linspace(-1.0, 1.0, 64).view(8, 8)
    matrix, vector = nn.Parameter(start.clone()), nn.Parameter(start.flatten()[entries].clone())
    try:
        with torch.random.fork_rng(devices=[]):
            _run(inner, options, matrix)
            _run(inner, options, vector)
    except Exception as fault:
        unknown = [name for name in options if name not in known]
        if unknown and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            raise ConfigError(
                f"{inner.__name__} has no option {unknown[0]!r}. It takes {', '.join(known)}."
            ) from None
        reason = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
        raise ConfigError(f"{inner.__name__} cannot update single entries ({reason}). {_REMEDY}") from None
    if not torch.allclose(matrix.detach().flatten()[entries], vector.detach(), rtol=1e-5, atol=1e-7):
        raise ConfigError(
            f"{inner.__name__} mixes coordinates, so it cannot update a child's entries alone. {_REMEDY}"
        )


def _run(inner: type[Optimizer], options: Mapping[str, Any], parameter: nn.Parameter) -> None:
    optimizer = inner([parameter], **options)
    for step in range(_STEPS):
        parameter.grad = torch.sin(parameter.detach() * (step + 2)) + 0.1 * step
        optimizer.step()
