"""last-k: the last layers and the head are trained."""

from __future__ import annotations

from dataclasses import dataclass

from childtuning.errors import ConfigError
from childtuning.methods.refusal import check_layers
from childtuning.methods.registry import register
from childtuning.methods.whole import WholeParameters, train_only
from childtuning.training import Prepared, find_layers


@register
@dataclass(frozen=True)
class LastK(WholeParameters):
    """Top-K tuning: the last k layers, what lies behind them, and the head; all before them is frozen.

    Args:
        layers: k; a Transformer's layers, or a CNN's blocks.
    """

    layers: int = 3

    name = "last-k"
    summary = "train the last k layers and the head, frozen below (Top-K tuning)"
    source = "Houlsby et al. 2019, arXiv 1902.00751"
    trains = "the last k layers and the head"
    chooses = True
    acts_on_pretrained = True

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ConfigError(
                f"last-k trains at least 1 layer, got {self.layers}. For the head alone use 'head'."
            )

    def prepare(self, prepared: Prepared) -> Prepared:
        """Freeze everything below the last k layers."""
        found = find_layers(prepared.model)
        check_layers(self.name, self.layers, len(found.layers))
        names = [name for layer in found.layers[-self.layers :] for name in layer]
        return train_only(prepared, [*names, *found.after])
