"""Which rule gives the per-example gradients of which layer: a registry by module class.

A rule is a function of (module, x, dY): the module, the input it was called with and the gradient of the batch's
summed loss at its output, both with the B examples as first axis and floating tensors in the scores' dtype. It returns,
by the parameter's attribute name, an ``ExampleGradients`` or a tensor [B, *shape] of the gradients themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from childtuning.fisher.gradients import ExampleGradients

Rule = Callable[[Any, Tensor, Tensor], Mapping[str, "ExampleGradients | Tensor"]]
Recogniser = Callable[[nn.Module], bool]

_BY_CLASS: dict[type[nn.Module], Rule] = {}
_BY_LOOK: list[tuple[Recogniser, Rule]] = []


class UnsupportedLayerError(Exception):
    """Raised by a rule for an option it does not know; the engine then takes the batch-of-one loop."""


def register_rule(key: type[nn.Module] | Recogniser, rule: Rule) -> None:
    """Use a rule for a module class and its subclasses, in place of an earlier one for the same class.

    A wrong rule does no harm: rules are compared with the batch-of-one loop on two examples of the first batch.

    Args:
        key: the class; or a function that recognises modules by their look, asked when no class fits.
        rule: ``rule(module, x, dY) -> {attribute: gradients}``, x and dY with the examples as first axis.

    Example:
        >>> import torch
        >>> class Scale(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.factor = torch.nn.Parameter(torch.ones(()))
        ...     def forward(self, x):
        ...         return self.factor * x
        >>> register_rule(Scale, lambda module, x, dY: {"factor": (dY * x).flatten(1).sum(1)})
        >>> find_rule(Scale()) is not None
        True
    """
    if isinstance(key, type):
        _BY_CLASS[key] = rule
    else:
        _BY_LOOK.append((key, rule))


def rule(*keys: type[nn.Module] | Recogniser) -> Callable[[Rule], Rule]:
    """Register the decorated function as the rule of all these classes or recognisers."""

    def register(function: Rule) -> Rule:
        for key in keys:
            register_rule(key, function)
        return function

    return register


def find_rule(module: nn.Module) -> Rule | None:
    """Return the rule of the module's class, else of its nearest base class, else of the latest look that fits."""
    for cls in type(module).__mro__:
        if cls in _BY_CLASS:
            return _BY_CLASS[cls]
    return next((found for fits, found in reversed(_BY_LOOK) if fits(module)), None)


def own_parameters(module: nn.Module) -> set[str]:
    """Return the attribute names of the parameters that the module itself owns."""
    return {name for name, parameter in module._parameters.items() if parameter is not None}
