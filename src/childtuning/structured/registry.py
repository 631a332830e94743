"""Which class stands in for which layer: a registry by exact module class.

Subclasses do not match: they, or the modules that own them, may use the weight in a way of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeVar

from torch import nn

from childtuning.structured.trained import Trained

_BY_CLASS: dict[type[nn.Module] | str, type[StructuredLayer]] = {}


class StructuredLayer(nn.Module):
    """A layer that computes of its ``weight``'s gradient only what ``trained_weight`` asks for.

    A subclass overrides ``forward`` and, unless ``in_use``, leaves it to the class that it stands in for. It lets only
    ``weight.detach()`` into the graph, and gives ``trained_weight.leaf`` its gradient. It has the state of the class
    that it stands in for and nothing more.
    """

    trained_weight: Trained

    @property
    def in_use(self) -> bool:
        """Whether the module's weight is the one that this was installed for.

        It is not in a copy of the model, under ``torch.func.functional_call``, or where the weight has been
        parametrized or replaced since: then the gradient belongs to that other tensor, as ever.
        """
        return self.trained_weight.weight is not None and self.trained_weight.weight is self._parameters.get(
            "weight"
        )

    @staticmethod
    def fits(module: nn.Module, trained: Trained) -> bool:
        """Return whether this module's options are supported; if not, it keeps its class and its dense gradient."""
        return True


T = TypeVar("T", bound=type[StructuredLayer])


def register_structured(module_class: type[nn.Module] | str) -> Callable[[T], T]:
    """Let the decorated class stand in for modules of exactly this class, in place of an earlier one.

    Args:
        module_class: the class, of which the decorated one is best a subclass; or, for a class that shall not be
            imported, its "module.qualified name".
    """

    def register(structured: T) -> T:
        _BY_CLASS[module_class] = structured
        return structured

    return register


def find_structured(module: nn.Module, trained: Trained) -> type[nn.Module] | None:
    """Return the subclass of the module's class that computes these gradients only, if there is one."""
    cls = type(module)
    structured = _BY_CLASS.get(cls) or _BY_CLASS.get(f"{cls.__module__}.{cls.__qualname__}")
    if structured is None or not structured.fits(module, trained):
        return None
    return _subclass(structured, cls)


@cache
def _subclass(structured: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    """Return the structured class itself, or its mix with a class that it could not import."""
    return structured if issubclass(structured, cls) else type(structured.__name__, (structured, cls), {})
