"""The child of lowest Fisher information: the paper's ablation."""

from __future__ import annotations

from dataclasses import replace

from childtuning.config import ChildConfig
from childtuning.methods.registry import register


@register
class ChildLowest:
    """The share p of lowest Fisher information, and the new head."""

    name = "child-lowest"
    summary = "train the entries that matter least to the task (ablation)"
    source = "Xu et al. 2021, section 5"
    trains = "the bottom share p by Fisher information, fixed"
    density = 0.3

    def child(self, options: ChildConfig) -> ChildConfig:
        """Return the child of lowest scores."""
        return replace(options, variant="task-driven", scores="fisher", lowest=True)
