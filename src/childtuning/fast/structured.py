"""Layers that never form the dense gradient of a weight of which only some rows or tiles are trained.

``install`` gives modules of a model a class that computes of its weight's gradient only what a ``Leaf`` asks for; the
layers themselves stand in ``fast/layers.py``. A part's ``groups()`` say what is trained: where rows meet columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from childtuning import fast
from childtuning.errors import ParameterError, did_you_mean

# What of one axis is trained: sorted indices, a run, or ``None`` for all of it; a group is rows and columns.
Chosen = Tensor | slice | None
Group = tuple[Chosen, Chosen]

CONV1D = "transformers.pytorch_utils.Conv1D"  # a linear layer whose weight is [in, out]
_BY_CLASS: dict[type[nn.Module] | str, type[StructuredLayer]] = {}


@dataclass(eq=False)
class Leaf:
    """The trained entries of one weight, and the tensor that collects their gradient.

    A structured layer reads both at every forward pass, so either may be replaced between steps.

    Args:
        groups: where rows meet columns; tensors on the weight's device.
        tensor: flat [n], requires grad. Only its ``.grad`` matters: the gradients of the n trained entries, group by
            group and row-major; empty, but there, where nothing is trained and the loss reached the weight. Its data
            is never read, so it may be one number expanded: ``Leaf.of``.
        weight: the weight that it is of, once installed.
    """

    groups: Sequence[Group]
    tensor: Tensor
    weight: Tensor | None = field(default=None, repr=False)

    def __reduce__(self) -> tuple[type[Leaf], tuple[list[Group], Tensor]]:
        """Copy without the weight: nobody waits for the gradient of a copied layer's leaf."""
        return type(self), ([], torch.empty(0))

    @classmethod
    def of(cls, groups: Sequence[Group], size: int, weight: Tensor, dtype: torch.dtype | None = None) -> Leaf:
        """Return a leaf of ``size`` entries that takes no memory, for gradients of a dtype (default the weight's)."""
        one = torch.empty(1, dtype=dtype or weight.dtype, device=weight.device)
        return cls(groups, one.expand(size).requires_grad_())


class StructuredLayer(nn.Module):
    """A layer that computes of its ``weight``'s gradient only what its ``leaf`` asks for.

    A subclass says in ``compute`` what it does while it is ``in_use``; else the class that it stands in for goes on. It
    lets only ``weight.detach()`` into the graph, and gives the leaf its gradient. It has the state of the class that it
    stands in for and nothing more.
    """

    leaf: Leaf

    compute: Callable[..., Tensor]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer."""
        return self.compute(*args, **kwargs) if self.in_use else super().forward(*args, **kwargs)

    @property
    def in_use(self) -> bool:
        """Whether the module's weight is the one that this was installed for.

        It is not where the weight was frozen, parametrized or replaced since, in a copy of the model, or under
        ``torch.func``'s transforms: then the gradient belongs to another tensor, as ever, or to none.
        """
        weight = self.leaf.weight
        return (
            weight is not None
            and weight is self._parameters.get("weight")
            and weight.requires_grad
            and not torch._C._are_functorch_transforms_active()  # the one form that torch.compile can trace
        )

    @staticmethod
    def fits(module: nn.Module, leaf: Leaf) -> bool:
        """Return whether this module's options are supported; if not, it keeps its class and its dense gradient."""
        return True


T = TypeVar("T", bound=type[StructuredLayer])


def register_structured(module_class: type[nn.Module] | str) -> Callable[[T], T]:
    """Let the decorated class stand in for modules of exactly this class, in place of an earlier one.

    Subclasses do not match: they, or the modules that own them, may use the weight in a way of their own.

    Args:
        module_class: the class, of which the decorated one is best a subclass; or, for a class that shall not be
            imported, its "module.qualified name".
    """

    def register(structured: T) -> T:
        _BY_CLASS[module_class] = structured
        return structured

    return register


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
            del module.leaf
        self._replaced.clear()


def install(model: nn.Module, leaves: Mapping[str, Leaf]) -> Installed:
    """Let the layers that own these weights compute of their gradients only what is trained.

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
    from childtuning.fast import layers  # noqa: F401  (importing it registers the layers)

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
        if (cls := _structured(module, leaves[name])) is not None:
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
    return installed


@contextmanager
def set_aside(model: nn.Module) -> Iterator[None]:
    """Let a model's weights have their dense gradients inside, whatever is installed."""
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
    """The class to give the module, unless its weight is a tensor subclass or hooked, or its forward was replaced."""
    weight = module._parameters["weight"]
    if not fast.enabled():
        return None
    if type(weight) is not nn.Parameter or "forward" in vars(module):
        return None
    if (
        weight._backward_hooks or weight._post_accumulate_grad_hooks
    ):  # they wait for the gradient that is not formed
        return None
    return _find(module, leaf)


def _find(module: nn.Module, leaf: Leaf) -> type[nn.Module] | None:
    """Return the subclass of the module's class that computes these gradients only, if there is one."""
    cls = type(module)
    structured = _BY_CLASS.get(cls) or _BY_CLASS.get(f"{cls.__module__}.{cls.__qualname__}")
    if structured is None or not structured.fits(module, leaf):
        return None
    return _subclass(structured, cls)


@cache
def _subclass(structured: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    """Return the structured class itself, or its mix with a class that it could not import."""
    return structured if issubclass(structured, cls) else type(structured.__name__, (structured, cls), {})


def take(tensor: Tensor, chosen: Chosen) -> Tensor:
    """Return the chosen coordinates of axis 1, as a view where possible."""
    if chosen is None:
        return tensor
    return tensor[:, chosen] if isinstance(chosen, slice) else tensor.index_select(1, chosen)


def join(gradients: Iterable[Tensor]) -> Tensor:
    """Lay the groups' gradients out as the leaf is: flat, one after another."""
    flat = [gradient.reshape(-1) for gradient in gradients]
    return flat[0] if len(flat) == 1 else torch.cat(flat)
