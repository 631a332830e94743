"""Full fine-tuning: every parameter is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace

from childtuning.config import ChildConfig
from childtuning.methods.registry import register
from childtuning.methods.whole import check_whole
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
        check_whole(self.name, config)
        return replace(config, variant="task-driven", rescale=False)
