"""Child-Tuning_F: a fresh random child each step."""

from __future__ import annotations

from dataclasses import replace

from childtuning.config import ChildConfig
from childtuning.methods.registry import register


@register
class ChildF:
    """A fresh Bernoulli(p) mask on the gradient each step, divided by p."""

    name = "child-f"
    summary = "train everything under a fresh random gradient mask each step (task-free)"
    source = "Xu et al. 2021, arXiv 2109.05687"
    trains = "everything, a random share p in each step"
    density = 0.3

    def child(self, options: ChildConfig) -> ChildConfig:
        """Return the task-free child."""
        return replace(options, variant="task-free")
