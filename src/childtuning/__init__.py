"""Fine-tune pretrained networks on little data by training only a child network."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from childtuning.child import (
        Budget,
        Child,
        ChildConfig,
        TaskFree,
        density_for_mass,
        magnitude_scores,
        random_child,
        select_child,
        unit_axes,
    )
    from childtuning.delta import ChildSwitch, Delta, merge_deltas
    from childtuning.fisher import fisher_information, training_costs
    from childtuning.optim import ChildOptimizer
    from childtuning.runs import load

__all__ = [
    "Budget",
    "Child",
    "ChildConfig",
    "ChildOptimizer",
    "ChildSwitch",
    "Delta",
    "TaskFree",
    "density_for_mass",
    "fisher_information",
    "load",
    "magnitude_scores",
    "merge_deltas",
    "random_child",
    "select_child",
    "training_costs",
    "unit_axes",
]
_HOMES = {
    "ChildOptimizer": "optim",
    "ChildSwitch": "delta",
    "Delta": "delta",
    "fisher_information": "fisher",
    "load": "runs",
    "merge_deltas": "delta",
    "training_costs": "fisher",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is asked for: the command line explains itself without torch."""
    if name == "__version__":
        return version("childtuning")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'child')}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return __all__
