"""freeze: the layers near the input stay as they are, whatever else is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace

from childtuning.child.eligible import named
from childtuning.errors import ConfigError
from childtuning.methods.refusal import check_layers
from childtuning.methods.registry import register
from childtuning.training import Method, Prepared, find_layers


@register
@dataclass(frozen=True)
class Freeze(Method):
    """An ingredient for the methods that choose parameters: embeddings or stem, and the first layers, are frozen.

    Args:
        layers: how many layers behind the embeddings; 0 freezes the embeddings alone.
    """

    layers: int = 0

    name = "freeze"
    summary = "freeze the embeddings and the first layers (to be joined with others)"
    source = "—"
    trains = "—"
    memory = "—"
    part = "start"
    chooses = True
    acts_on_pretrained = True

    def __post_init__(self) -> None:
        if self.layers < 0:
            raise ConfigError(
                f"freeze counts layers from 0, got {self.layers}. Pass 0 for the embeddings alone."
            )

    def prepare(self, prepared: Prepared) -> Prepared:
        """Take what is below out of what can be chosen.

        Raises:
            ModelError: the model has fewer layers.
        """
        found = find_layers(prepared.model)
        check_layers(self.name, self.layers, len(found.layers))
        frozen = {*found.before, *(name for layer in found.layers[: self.layers] for name in layer)}
        left = tuple(
            name for name in named(prepared.model) if name not in frozen and name not in prepared.always
        )
        return replace(prepared, eligible=left)
