"""Hyperparameters that are above zero."""

from __future__ import annotations

import math
from dataclasses import fields

from childtuning.errors import ConfigError
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
