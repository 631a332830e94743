"""Layer 1: from scores to a child."""

from childtuning.selection.baselines import magnitude_scores, random_child
from childtuning.selection.official import official_child
from childtuning.selection.top_share import select_child

__all__ = ["magnitude_scores", "official_child", "random_child", "select_child"]
