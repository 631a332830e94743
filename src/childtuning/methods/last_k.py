"""last-k: the last layers and the head are trained."""

from __future__ import annotations

from dataclasses import dataclass

from childtuning.config import ChildConfig
from childtuning.errors import ConfigError, ModelError
from childtuning.methods.registry import register
from childtuning.methods.whole import train_only, whole_child
from childtuning.training import Method, Prepared, find_layers


@register
@dataclass(frozen=True)
class LastK(Method):
    """Top-K tuning: the last k layers, what lies behind them, and the head; all before them is frozen.

    Args:
        layers: k; a Transformer's layers, or a CNN's blocks.
    """

    layers: int = 3

    name = "last-k"
    summary = "train the last k layers and the head, frozen below (Top-K tuning)"
    source = "Houlsby et al. 2019, arXiv 1902.00751"
    trains = "the last k layers and the head"
    memory = "2n state"
    part = "child"
    chooses = True

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ConfigError(
                f"last-k trains at least 1 layer, got {self.layers}. For the head alone use 'head'."
            )

    def child(self, config: ChildConfig) -> ChildConfig:
        """Return the child that is whole parameters."""
        return whole_child(self.name, config)

    def prepare(self, prepared: Prepared) -> Prepared:
        """Freeze everything below the last k layers."""
        found = find_layers(prepared.model)
        if self.layers > len(found.layers):
            raise ModelError(
                f"last-k:{self.layers} asks for {self.layers} layers, the model has {len(found.layers)}. Ask for fewer."
            )
        names = [name for layer in found.layers[-self.layers :] for name in layer]
        return train_only(prepared, [*names, *found.after])
