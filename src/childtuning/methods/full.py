"""Full fine-tuning: every parameter is trained."""

from __future__ import annotations

from dataclasses import dataclass

from childtuning.config import ChildConfig
from childtuning.methods.registry import register
from childtuning.methods.whole import whole_child
from childtuning.training import Method


@register
@dataclass(frozen=True)
class Full(Method):
    """Every parameter that requires a gradient, by the inner optimizer as it is: the child is the network itself."""

    name = "full"
    summary = "train every parameter (vanilla fine-tuning)"
    source = "—"
    trains = "everything"
    memory = "2n state"
    part = "child"

    def child(self, config: ChildConfig) -> ChildConfig:
        """Return the child that is everything."""
        return whole_child(self.name, config)
