"""Which methods there are."""

from __future__ import annotations

from typing import TypeVar

from childtuning.errors import ConfigError, did_you_mean
from childtuning.training import Method

_methods: dict[str, Method] = {}
M = TypeVar("M", bound=Method)


def register(method: type[M]) -> type[M]:
    """Make a method known by its name; a class decorator.

    Raises:
        ConfigError: the name is taken.
    """
    instance = method()
    if instance.name in _methods:
        raise ConfigError(f"there is a method {instance.name!r} already. Choose another name.")
    _methods[instance.name] = instance
    return method


def find_method(name: str) -> Method:
    """Return the method of this name.

    Raises:
        ConfigError: there is none; the nearest is suggested.
    """
    if name not in _methods:
        raise ConfigError(f"there is no method {name!r}. {did_you_mean(name, _methods)}")
    return _methods[name]


def all_methods() -> list[Method]:
    """Return every registered method, by name."""
    return [_methods[name] for name in sorted(_methods)]
