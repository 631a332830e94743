"""head: only the last layer is trained."""

from __future__ import annotations

from dataclasses import dataclass

from childtuning.config import ChildConfig
from childtuning.methods.registry import register
from childtuning.methods.whole import output_names, train_only, whole_child
from childtuning.training import Method, Prepared


@register
@dataclass(frozen=True)
class Head(Method):
    """The new head, or the output layer of a network without a new one: a linear probe of the pretrained features."""

    name = "head"
    summary = "train the last layer only, on frozen features"
    source = "—"
    trains = "the new head"
    memory = "2n state"
    part = "child"
    chooses = True

    def child(self, config: ChildConfig) -> ChildConfig:
        """Return the child that is whole parameters."""
        return whole_child(self.name, config)

    def prepare(self, prepared: Prepared) -> Prepared:
        """Leave the head alone to be trained."""
        return train_only(prepared, () if prepared.always else output_names(prepared.model))
