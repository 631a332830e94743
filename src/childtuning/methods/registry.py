"""The registry of methods: those of this folder, of installed packages, and those registered by a program."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

from childtuning.errors import ConfigError, no_method
from childtuning.training import PARTS, Method

ENTRY_POINTS = "childtuning.methods"
_NEEDED = ("name", "summary", "source", "trains", "memory", "part")
_methods: dict[str, type[Method]] = {}
M = TypeVar("M", bound=Method)


def register(method: type[M]) -> type[M]:
    """Register a method under its name; a class decorator, above ``@dataclass(frozen=True)``.

    A package can register methods without being imported, through the entry-point group ``childtuning.methods``.

    Raises:
        ConfigError: when the name is taken or contains a character reserved for combinations, or a class attribute is
            missing.
    """
    missing = [name for name in _NEEDED if not hasattr(method, name)]
    if missing:
        raise ConfigError(
            f"method {method.__name__} has no {missing[0]}. Set the class attribute {missing[0]!r}."
        )
    if any(sign in method.name for sign in "+:,=@ "):
        raise ConfigError(
            f"a method's name must contain none of '+:,=@ ', got {method.name!r}. Use letters and '-'."
        )
    if method.part not in PARTS:
        raise ConfigError(
            f"a method's part must be one of {', '.join(PARTS)}, got {method.part!r}. Set another."
        )
    known = _methods.get(method.name)
    if known is not None and (known.__module__, known.__qualname__) != (
        method.__module__,
        method.__qualname__,
    ):
        raise ConfigError(f"there is already a method {method.name!r}. Choose another name.")
    fields(method)  # type: ignore[arg-type]  # raises TypeError if it is not a dataclass
    _methods[method.name] = method
    return method


def find_method(name: str) -> type[Method]:
    """Return the method of this name.

    Raises:
        ConfigError: when there is none; the message suggests the closest name.
    """
    _load_declared()
    if name not in _methods:
        raise no_method(name, _methods)
    return _methods[name]


def all_methods() -> list[type[Method]]:
    """Return all registered methods, sorted by name."""
    _load_declared()
    return [_methods[name] for name in sorted(_methods)]


def described() -> list[dict[str, Any]]:
    """Return the description of every registered method, JSON-ready, sorted by name."""
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
                f"{entry.value}, declared as method {entry.name!r}, is not a subclass of Method. Declare one."
            )
        register(declared)
