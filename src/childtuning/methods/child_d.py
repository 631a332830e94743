"""Child-Tuning_D: a fixed child, chosen by Fisher information on the task."""

from __future__ import annotations

from dataclasses import replace

from childtuning.config import ChildConfig
from childtuning.methods.registry import register


@register
class ChildD:
    """The share p of highest Fisher information, and the new head."""

    name = "child-d"
    summary = "train the entries that matter most to the task, frozen elsewhere (task-driven)"
    source = "Xu et al. 2021, arXiv 2109.05687"
    trains = "the top share p by Fisher information, fixed"
    density = 0.3

    def child(self, options: ChildConfig) -> ChildConfig:
        """Return the task-driven child."""
        return replace(options, variant="task-driven", scores="fisher", lowest=False)
