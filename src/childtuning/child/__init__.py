"""Layer 1, the room the rest of the layer builds on: which entries of each parameter are trained."""

from childtuning.child.child import Child
from childtuning.child.eligible import unit_axes
from childtuning.child.select import (
    density_for_mass,
    magnitude_scores,
    official_child,
    random_child,
    select_child,
)
from childtuning.child.task_free import TaskFree
from childtuning.child.units import Granularity, Part
from childtuning.config import Budget, ChildConfig

__all__ = [
    "Budget",
    "Child",
    "ChildConfig",
    "Granularity",
    "Part",
    "TaskFree",
    "density_for_mass",
    "magnitude_scores",
    "official_child",
    "random_child",
    "select_child",
    "unit_axes",
]
