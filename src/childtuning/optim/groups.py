"""Parameter groups with names, in every form that torch's optimizers take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from childtuning.errors import ParameterError


@dataclass
class Group:
    """The named parameters of one group and the options that differ from the defaults."""

    named: dict[str, nn.Parameter]
    options: dict[str, Any]


def named_groups(params: Iterable[Any]) -> list[Group]:
    """Read ``model.named_parameters()``, or dicts whose ``params`` are (name, parameter) pairs.

    Raises:
        ParameterError: parameters without names, no parameters, or one that stands twice.
    """
    entries = list(params)
    if not entries:
        raise ParameterError("there are no parameters to optimise. Pass model.named_parameters().")
    if all(isinstance(entry, Mapping) for entry in entries):
        groups = [
            Group(_named(entry["params"]), {key: value for key, value in entry.items() if key != "params"})
            for entry in entries
        ]
    else:
        groups = [Group(_named(entries), {})]
    seen: dict[int, str] = {}
    for name, parameter in ((n, p) for group in groups for n, p in group.named.items()):
        if id(parameter) in seen:
            raise ParameterError(f"{name!r} and {seen[id(parameter)]!r} are one parameter. Pass it once.")
        seen[id(parameter)] = name
    names = [name for group in groups for name in group.named]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ParameterError(f"two parameters are named {twice!r}. Names must differ.")
    return groups


def _named(pairs: Any) -> dict[str, nn.Parameter]:
    named: dict[str, nn.Parameter] = {}
    for pair in [pairs] if isinstance(pairs, Tensor) else pairs:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)):
            raise ParameterError(
                f"a child knows parameters by name, got a {type(pair).__name__} without one. "
                "Pass model.named_parameters(), or groups whose 'params' are (name, parameter) pairs."
            )
        if pair[0] in named:
            raise ParameterError(f"two parameters are named {pair[0]!r}. Names must differ.")
        named[pair[0]] = pair[1]
    return named
