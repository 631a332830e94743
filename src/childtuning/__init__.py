"""Fine-tune pretrained networks on little data by training only a child network."""

from childtuning.child import Child
from childtuning.config import ChildConfig
from childtuning.delta import Delta
from childtuning.fisher import fisher_information
from childtuning.optim import ChildOptimizer
from childtuning.selection import density_for_mass, magnitude_scores, random_child, select_child
from childtuning.task_free import TaskFree

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
