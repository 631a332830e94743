"""child-random: a fixed random child, the paper's ablation."""

from __future__ import annotations

from dataclasses import dataclass, replace

from childtuning.child import ChildConfig
from childtuning.methods.registry import register
from childtuning.training import Method


@register
@dataclass(frozen=True)
class ChildRandom(Method):
    """A share p drawn at random once, and the new head."""

    name = "child-random"
    summary = "train a fixed random share (ablation)"
    source = "Xu et al. 2021, section 5"
    trains = "a random share p, fixed"
    memory = "3n with AdamW: state and places"
    part = "child"
    density = 0.3

    def child(self, config: ChildConfig) -> ChildConfig:
        """Return the child."""
        return replace(config, variant="task-driven", scores="random", lowest=False)
