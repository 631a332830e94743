"""child-d: a fixed child, chosen by Fisher information on the task."""

from __future__ import annotations

from dataclasses import dataclass, replace

from childtuning.child import ChildConfig
from childtuning.methods.registry import register
from childtuning.training import Method


@register
@dataclass(frozen=True)
class ChildD(Method):
    """The share p of highest Fisher information, and the new head."""

    name = "child-d"
    summary = "train the entries that matter most to the task, frozen elsewhere (task-driven)"
    source = "Xu et al. 2021, arXiv 2109.05687"
    trains = "the top share p by Fisher information, fixed"
    memory = "3n with AdamW: state and places"
    part = "child"
    density = 0.3

    def child(self, config: ChildConfig) -> ChildConfig:
        """Return the child."""
        return replace(config, variant="task-driven", scores="fisher", lowest=False)
