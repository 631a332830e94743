"""child-lowest: the child of lowest Fisher information, the paper's ablation."""

from __future__ import annotations

from dataclasses import dataclass, replace

from childtuning.child import ChildConfig
from childtuning.methods.registry import register
from childtuning.training import Method


@register
@dataclass(frozen=True)
class ChildLowest(Method):
    """The share p of lowest Fisher information, and the new head."""

    name = "child-lowest"
    summary = "train the entries that matter least to the task (ablation)"
    source = "Xu et al. 2021, section 5"
    trains = "the bottom share p by Fisher information, fixed"
    memory = "3n with AdamW: state and places"
    part = "child"
    density = 0.3

    def child(self, config: ChildConfig) -> ChildConfig:
        """Return the child."""
        return replace(config, variant="task-driven", scores="fisher", lowest=True)
