"""child-f: a fresh random child each step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from childtuning.child import ChildConfig
from childtuning.methods.registry import register
from childtuning.training import Method


@register
@dataclass(frozen=True)
class ChildF(Method):
    """A fresh Bernoulli(p) mask on the gradient each step, divided by p."""

    name = "child-f"
    summary = "train everything under a fresh random gradient mask each step (task-free)"
    source = "Xu et al. 2021, arXiv 2109.05687"
    trains = "everything, a random share p in each step"
    memory = "2n state"
    part = "child"
    density = 0.3

    def child(self, config: ChildConfig) -> ChildConfig:
        """Return the child."""
        return replace(config, variant="task-free")
