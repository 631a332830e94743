"""Layer 0: layers that never form the dense gradient of a weight of which only some rows or tiles are trained."""

from childtuning.structured.groups import Chosen, Group, part_groups
from childtuning.structured.install import Installed, install, set_aside
from childtuning.structured.registry import StructuredLayer, register_structured
from childtuning.structured.trained import Trained

__all__ = [
    "Chosen",
    "Group",
    "Installed",
    "StructuredLayer",
    "Trained",
    "install",
    "part_groups",
    "register_structured",
    "set_aside",
]
