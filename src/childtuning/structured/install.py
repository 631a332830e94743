"""Put structured layers into a model, and take them out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from childtuning.errors import ParameterError, did_you_mean
from childtuning.structured import conv1d, convolution, embedding, linear
from childtuning.structured.registry import StructuredLayer, find_structured
from childtuning.structured.trained import Trained

BUILT_IN = (conv1d, convolution, embedding, linear)  # importing them registers their layers


@dataclass(eq=False)
class Installed:
    """What ``install`` changed.

    Args:
        names: the parameters whose gradient now comes through their leaf. One that is also used elsewhere, as by
            ``F.linear(x, other.weight)``, has a dense ``.grad`` from there: the two add up to the gradient.
        dense: the others; no layer of theirs is supported, and their gradient comes as ever.
    """

    names: tuple[str, ...]
    dense: tuple[str, ...]
    _replaced: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list, repr=False)

    def remove(self) -> None:
        """Give every module its class back; a second call does nothing."""
        for module, cls in self._replaced:
            module.__class__ = cls
            del module.trained_weight
        self._replaced.clear()


def install(model: nn.Module, trained: Mapping[str, Trained]) -> Installed:
    """Let the layers that own these weights compute of their gradients only what is trained.

    The modules stay where they are and only change their class, to a subclass, so ``isinstance``, hooks and the state
    dict are as before. The weights keep ``requires_grad``.

    Args:
        model: the model.
        trained: what is trained of some of its parameters, by the names of ``model.named_parameters()``.
    Returns:
        What was installed, to be removed before anything else is.
    Raises:
        ParameterError: the model has no such parameter, or structured layers already.
    """
    parameters = dict(model.named_parameters())
    for name in trained:
        if name not in parameters:
            raise ParameterError(f"the model has no parameter {name!r}. " + did_you_mean(name, parameters))
    names_by_parameter = {parameters[name]: name for name in trained}
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
        if (cls := _structured(module, trained[name])) is not None:
            found.append((module, cls, name))
    names = {name for _, _, name in found}
    installed = Installed(
        tuple(name for name in trained if name in names),
        tuple(name for name in trained if name not in names),
        [(module, type(module)) for module, _, _ in found],
    )
    for module, cls, name in found:
        trained[name].weight = parameters[name]
        module.__class__ = cls
        vars(module)["trained_weight"] = trained[name]
    return installed


@contextmanager
def set_aside(model: nn.Module) -> Iterator[None]:
    """Let a model's weights have their dense gradients inside, whatever is installed."""
    layers = [module for module in model.modules() if isinstance(module, StructuredLayer)]
    weights = [
        (trained, trained.weight)
        for trained in {id(t): t for t in (layer.trained_weight for layer in layers)}.values()
    ]
    try:
        for trained, _ in weights:
            trained.weight = None
        yield
    finally:
        for trained, weight in weights:
            trained.weight = weight


def _structured(module: nn.Module, trained: Trained) -> type[nn.Module] | None:
    """The class to give the module, unless its weight is a tensor subclass or hooked, or its forward was replaced."""
    weight = module._parameters["weight"]
    if type(weight) is not nn.Parameter or "forward" in vars(module):
        return None
    if (
        weight._backward_hooks or weight._post_accumulate_grad_hooks
    ):  # they wait for the gradient that is not formed
        return None
    return find_structured(module, trained)
