"""What methods refuse: numbers out of range, and models that they do not apply to."""

from __future__ import annotations

import math
from dataclasses import fields

from torch import nn

from childtuning.errors import ConfigError, ModelError
from childtuning.training import Method


def check_positive(method: Method) -> None:
    """Refuse numbers of a method that are not above 0, or not finite.

    Raises:
        ConfigError: one of its fields of type float is such a number; the message names all of them.
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
    """Return the error that says why a method does not apply to a model, in one line.

    Example:
        >>> from torch import nn
        >>> str(not_for("prefix", nn.Linear(1, 1), "it has no attention"))
        "method 'prefix' does not apply to Linear: it has no attention."
    """
    reason = (str(why).splitlines() or [""])[0].rstrip(".") or type(why).__name__
    return ModelError(f"method {method!r} does not apply to {type(model).__name__}: {reason}.")


def check_layers(method: str, asked: int, there: int) -> None:
    """Raise a ModelError if a method asks for more layers than the model has."""
    if asked > there:
        raise ModelError(f"{method}:{asked} asks for {asked} layers, the model has {there}. Ask for fewer.")
