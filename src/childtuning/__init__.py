"""Fine-tune pretrained networks on little data by training only a child network."""

from childtuning.child import (
    Child,
    ChildConfig,
    TaskFree,
    density_for_mass,
    magnitude_scores,
    random_child,
    select_child,
)
from childtuning.delta import Delta
from childtuning.fisher import fisher_information
from childtuning.optim import ChildOptimizer

__all__ = [
    "Child",
    "ChildConfig",
    "ChildOptimizer",
    "Delta",
    "TaskFree",
    "density_for_mass",
    "fisher_information",
    "magnitude_scores",
    "random_child",
    "select_child",
]
