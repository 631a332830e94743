"""A fixed random child: the paper's ablation."""

from __future__ import annotations

from dataclasses import replace

from childtuning.config import ChildConfig
from childtuning.methods.registry import register


@register
class ChildRandom:
    """A share p drawn at random once, and the new head."""

    name = "child-random"
    summary = "train a fixed random share (ablation)"
    source = "Xu et al. 2021, section 5"
    trains = "a random share p, fixed"
    density = 0.3

    def child(self, options: ChildConfig) -> ChildConfig:
        """Return the fixed random child."""
        return replace(options, variant="task-driven", scores="random", lowest=False)
