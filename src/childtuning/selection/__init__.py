"""Layer 1: from scores to a child."""

from childtuning.selection.baselines import magnitude_scores, random_child
from childtuning.selection.mass import check_mass, density_for_mass
from childtuning.selection.official import official_child
from childtuning.selection.top_share import select_child

__all__ = [
    "check_mass",
    "density_for_mass",
    "magnitude_scores",
    "official_child",
    "random_child",
    "select_child",
]
