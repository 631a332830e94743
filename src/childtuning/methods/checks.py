"""Checks of methods: numbers out of range, and models to which a method does not apply."""

from __future__ import annotations

import math
from dataclasses import fields

from torch import nn

from childtuning.errors import ConfigError, ModelError
from childtuning.training import Layers, Method, find_layers


def check_positive(method: Method) -> None:
    """Check that all float fields of a method are above 0 and finite.

    Raises:
        ConfigError: naming all fields that are not.
    """
    numbers = {field: getattr(method, field.name) for field in fields(method) if field.type == "float"}  # type: ignore[arg-type]
    faults = [
        f"{field.name} of {method.name!r} must be above 0, got {value}. Pass {field.name}={field.default}."
        for field, value in numbers.items()
        if not 0 < value < math.inf
    ]
    if faults:
        raise ConfigError(" ".join(faults))


def not_for(method: str, model: nn.Module, why: BaseException | str) -> ModelError:
    """Return the error for a method that does not apply to a model, with the reason in one line.

    Example:
        >>> from torch import nn
        >>> str(not_for("prefix", nn.Linear(1, 1), "it has no attention"))
        "method 'prefix' does not apply to Linear: it has no attention."
    """
    reason = (str(why).splitlines() or [""])[0].rstrip(".") or type(why).__name__
    return ModelError(f"method {method!r} does not apply to {type(model).__name__}: {reason}.")


def layers_of(method: str, model: nn.Module) -> Layers:
    """Return a network's layers for a method to which their order matters.

    Raises:
        ModelError: the order cannot be told.
    """
    found = find_layers(model)
    if found.beside:
        names = " and ".join(map(repr, found.beside))
        raise not_for(
            method,
            model,
            f"{names} are lists of layers beside each other, whose order cannot be told. Use child-d, with eligible "
            "patterns for a part of the network",
        )
    return found


def check_layers(method: str, asked: int, there: int) -> None:
    """Raise a ModelError if a method needs more layers than the model has."""
    if asked > there:
        raise ModelError(f"{method}:{asked} needs {asked} layers, but the model has {there}. Pass fewer.")
