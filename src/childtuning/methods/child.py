"""Methods that train a child: child-d and child-f, the paper's two, and its ablations child-lowest and child-random."""

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
