"""Methods that train a child: child-d and child-f, the paper's two, and its ablations child-lowest and child-random."""

from __future__ import annotations

from dataclasses import dataclass, replace

from childtuning.child import ChildConfig
from childtuning.config import CHILD_METHODS
from childtuning.methods.registry import register
from childtuning.training import Method


@register
@dataclass(frozen=True)
class ChildD(Method):
    """Train the share p of entries with the highest Fisher information, and the new head."""

    name = "child-d"
    summary = "train the entries that matter most to the task, freeze the rest (task-driven)"
    source = "Xu et al. 2021, arXiv 2109.05687"
    trains = "the top share p by Fisher information, fixed"
    memory = "3n with AdamW: state and positions"
    part = "child"
    density = 0.3
    shards = True

    def child(self, config: ChildConfig) -> ChildConfig:
        """Return the child's configuration."""
        return replace(config, **CHILD_METHODS["child-d"])


@register
@dataclass(frozen=True)
class ChildF(Method):
    """Multiply the gradient by a fresh Bernoulli(p) mask in each step, and divide it by p."""

    name = "child-f"
    summary = "train everything with a fresh random gradient mask in each step (task-free)"
    source = "Xu et al. 2021, arXiv 2109.05687"
    trains = "everything, a random share p in each step"
    memory = "2n state"
    part = "child"
    density = 0.3
    shards = True

    def child(self, config: ChildConfig) -> ChildConfig:
        """Return the child's configuration."""
        return replace(config, **CHILD_METHODS["child-f"])


@register
@dataclass(frozen=True)
class ChildLowest(Method):
    """Train the share p of entries with the lowest Fisher information, and the new head."""

    name = "child-lowest"
    summary = "train the entries that matter least to the task (ablation)"
    source = "Xu et al. 2021, section 5"
    trains = "the bottom share p by Fisher information, fixed"
    memory = "3n with AdamW: state and positions"
    part = "child"
    density = 0.3
    shards = True

    def child(self, config: ChildConfig) -> ChildConfig:
        """Return the child's configuration."""
        return replace(config, **CHILD_METHODS["child-lowest"])


@register
@dataclass(frozen=True)
class ChildRandom(Method):
    """Train a share p of entries, drawn at random once, and the new head."""

    name = "child-random"
    summary = "train a fixed random share (ablation)"
    source = "Xu et al. 2021, section 5"
    trains = "a random share p, fixed"
    memory = "3n with AdamW: state and positions"
    part = "child"
    density = 0.3
    shards = True

    def child(self, config: ChildConfig) -> ChildConfig:
        """Return the child's configuration."""
        return replace(config, **CHILD_METHODS["child-random"])
