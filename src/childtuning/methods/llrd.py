"""llrd: lower learning rates for lower layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from childtuning.errors import ConfigError
from childtuning.methods.checks import layers_of
from childtuning.methods.registry import register
from childtuning.training import Method


@register
@dataclass(frozen=True)
class LayerwiseDecay(Method):
    """Train depth d of a network of L layers at the rate lr·decay^(L + 1 − d).

    Parameters after the last layer (depth L + 1) and all new parameters have the full rate, the last layer decay times
    the full rate, and embeddings (depth 0) the smallest. Schedules multiply all rates by the same factor.

    Args:
        decay: the factor per layer, in (0, 1]; 1 changes nothing. Typical values are 0.75 to 0.95.
    """

    name = "llrd"
    summary = "lower learning rates for layers nearer the input"
    source = "Howard & Ruder 2018, arXiv 1801.06146"
    trains = "the child's entries, lower layers more slowly"
    memory = "nothing"
    part = "update"
    acts_on_pretrained = True

    decay: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise ConfigError(f"decay of 'llrd' must be in (0, 1], got {self.decay}. Pass decay=0.95.")

    def group_options(
        self, model: nn.Module, always: tuple[str, ...], options: Mapping[str, Any]
    ) -> dict[str, dict[str, Any]]:
        """Return each parameter's learning rate."""
        found = layers_of(self.name, model)
        behind = len(found.layers) + 1
        rates = {name: options["lr"] * self.decay ** (behind - d) for name, d in found.depth().items()}
        return {
            name: {"lr": rate} for name, rate in {**rates, **dict.fromkeys(always, options["lr"])}.items()
        }
