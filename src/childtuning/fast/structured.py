"""Layers that never form the dense gradient of a weight when only some rows or tiles are trained.

``install`` replaces the classes of modules by ones that compute only the part of the weight's gradient that a ``Leaf``
describes; the layers themselves are in ``fast/layers.py``. ``Part.groups()`` gives the trained rows and columns.
Beside such layers dropouts keep less for the backward pass: `fast/dropout.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import nn

from childtuning import fast
from childtuning.errors import ParameterError, did_you_mean
from childtuning.fast.dropout import spare_dropouts
from childtuning.fast.layers import BY_CLASS, Leaf, StructuredLayer, plain_class


@dataclass(eq=False)
class Installed:
    """What ``install`` changed.

    Args:
        names: the parameters whose gradient now comes through their leaf. One that is also used elsewhere, as by
            ``F.linear(x, other.weight)``, has a dense ``.grad`` from there: the two add up to the gradient.
        dense: the others; none of their layers is supported, and they keep dense gradients.
    """

    names: tuple[str, ...]
    dense: tuple[str, ...]
    _replaced: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list, repr=False)
    _spare_not: Callable[[], None] = field(default=lambda: None, repr=False)

    def remove(self) -> None:
        """Restore every module's class, and the attention; a second call does nothing."""
        for module, cls in self._replaced:
            module.__class__ = cls
            vars(module).pop("leaf", None)
        self._replaced.clear()
        self._spare_not()
        self._spare_not = lambda: None


def install(model: nn.Module, leaves: Mapping[str, Leaf]) -> Installed:
    """Let the layers that own these weights compute only the trained part of their gradients.

    The modules stay where they are and only change their class, to a subclass, so ``isinstance``, hooks and the state
    dict are as before. The weights keep ``requires_grad``.

    Args:
        model: the model.
        leaves: what is trained of some of its parameters, by the names of ``model.named_parameters()``.
    Returns:
        What was installed, to be removed before anything else is.
    Raises:
        ParameterError: the model has no such parameter, or structured layers already.
    """
    parameters = dict(model.named_parameters())
    for name in leaves:
        if name not in parameters:
            raise ParameterError(f"the model has no parameter {name!r}. " + did_you_mean(name, parameters))
    names_by_parameter = {parameters[name]: name for name in leaves}
    found: list[tuple[nn.Module, type[nn.Module], str]] = []
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        name = None if weight is None else names_by_parameter.get(weight)
        if name is None:
            continue
        if isinstance(module, StructuredLayer):
            raise ParameterError(
                f"{path!r} is a structured layer already. Call remove() on what installed it."
            )
        if fast.enabled() and (cls := _structured(module, leaves[name])) is not None:
            found.append((module, cls, name))
    names = {name for _, _, name in found}
    installed = Installed(
        tuple(name for name in leaves if name in names),
        tuple(name for name in leaves if name not in names),
        [(module, type(module)) for module, _, _ in found],
    )
    for module, cls, name in found:
        leaves[name].weight = parameters[name]
        module.__class__ = cls
        vars(module)["leaf"] = leaves[name]
    if fast.enabled():
        installed._spare_not = spare_dropouts(model)
    return installed


def formed_alone(module: nn.Module) -> list[str]:
    """Return of which units of its weight a module forms the gradient alone: of ``row``, ``column`` and ``block``."""
    one, whole = slice(0, 1), slice(0, module._parameters["weight"].shape[2:].numel())  # type: ignore[union-attr]
    groups = {"row": [(one, None)], "column": [(None, whole)], "block": [(one, one), (one, one)]}
    return [
        unit
        for unit, some in groups.items()
        if _find(module, Leaf(some, torch.empty(0, device="cpu"))) is not None
    ]


@contextmanager
def set_aside(model: nn.Module) -> Iterator[None]:
    """Form dense gradients inside the context, even where structured layers are installed."""
    found = [module.leaf for module in model.modules() if isinstance(module, StructuredLayer)]
    weights = [(leaf, leaf.weight) for leaf in {id(leaf): leaf for leaf in found}.values()]
    try:
        for leaf, _ in weights:
            leaf.weight = None
        yield
    finally:
        for leaf, weight in weights:
            leaf.weight = weight


def _structured(module: nn.Module, leaf: Leaf) -> type[nn.Module] | None:
    """Return the class for a module; ``None`` if its weight is a subclass, or has hooks that wait for all of it."""
    weight = module._parameters["weight"]
    if type(weight) is not nn.Parameter or weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return None
    return _find(module, leaf)


def _find(module: nn.Module, leaf: Leaf) -> type[nn.Module] | None:
    """Return the subclass of the module's class that computes these gradients only, unless its forward was replaced."""
    cls = plain_class(module)
    structured = BY_CLASS.get(cls) or BY_CLASS.get(f"{cls.__module__}.{cls.__qualname__}")
    if structured is None or "forward" in vars(module) or not structured.fits(module, leaf):
        return None
    return _subclass(structured, cls)


@cache
def _subclass(structured: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    """Return the structured class itself, or its mix with a class that it could not import."""
    return structured if issubclass(structured, cls) else type(structured.__name__, (structured, cls), {})
