"""Which methods there are: those of this folder, those that packages declare, and those that a program registers."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

from childtuning.errors import ConfigError, did_you_mean
from childtuning.training import PARTS, Method

ENTRY_POINTS = "childtuning.methods"
_NEEDED = ("name", "summary", "source", "trains", "memory", "part")
_methods: dict[str, type[Method]] = {}
M = TypeVar("M", bound=Method)


def register(method: type[M]) -> type[M]:
    """Make a method known by its name; a class decorator, above ``@dataclass(frozen=True)``.

    A package makes its methods known without being imported first by the entry-point group ``childtuning.methods``.

    Raises:
        ConfigError: the name is taken or holds a sign that combinations use, or the class does not describe itself.
    """
    missing = [name for name in _NEEDED if not hasattr(method, name)]
    if missing:
        raise ConfigError(
            f"method {method.__name__} says nothing of its {missing[0]}. Set the class attribute {missing[0]!r}."
        )
    if any(sign in method.name for sign in "+:,= "):
        raise ConfigError(f"a method's name holds none of '+:,= ', got {method.name!r}. Use letters and '-'.")
    if method.part not in PARTS:
        raise ConfigError(f"a method's part is one of {', '.join(PARTS)}, got {method.part!r}. Set another.")
    known = _methods.get(method.name)
    if known is not None and (known.__module__, known.__qualname__) != (
        method.__module__,
        method.__qualname__,
    ):
        raise ConfigError(f"there is a method {method.name!r} already. Choose another name.")
    fields(method)  # type: ignore[arg-type]  # a TypeError here says that it is no dataclass
    _methods[method.name] = method
    return method


def find_method(name: str) -> type[Method]:
    """Return the method of this name.

    Raises:
        ConfigError: there is none; the nearest is suggested.
    """
    _load_declared()
    if name not in _methods:
        raise ConfigError(f"there is no method {name!r}. {did_you_mean(name, sorted(_methods))}")
    return _methods[name]


def all_methods() -> list[type[Method]]:
    """Return every registered method, by name."""
    _load_declared()
    return [_methods[name] for name in sorted(_methods)]


def described() -> list[dict[str, Any]]:
    """Return what every registered method says of itself, JSON-ready, by name."""
    listed = []
    for method in all_methods():
        facts = {name: getattr(method, name) for name in (*_NEEDED, "density")}
        options = {option.name: option.default for option in fields(method)}  # type: ignore[arg-type]
        listed.append({**facts, "options": options})
    return listed


@cache
def _load_declared() -> None:
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            declared = entry.load()
        except Exception as fault:
            raise ConfigError(
                f"method {entry.name!r} cannot be loaded from {entry.value} ({type(fault).__name__}: {fault}). "
                "Repair the package that declares it, or uninstall it."
            ) from fault
        if not (isinstance(declared, type) and issubclass(declared, Method)):
            raise ConfigError(
                f"{entry.value}, declared as method {entry.name!r}, is no Method. Declare a class."
            )
        register(declared)
