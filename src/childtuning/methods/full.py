"""Full fine-tuning: every parameter is trained."""

from __future__ import annotations

from dataclasses import dataclass

from childtuning.methods.registry import register
from childtuning.methods.whole import WholeParameters


@register
@dataclass(frozen=True)
class Full(WholeParameters):
    """Every parameter that requires a gradient, by the inner optimizer as it is: the child is the network itself."""

    name = "full"
    summary = "train every parameter (vanilla fine-tuning)"
    source = "—"
    trains = "everything"
