"""head: only the last layer is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from childtuning.methods.registry import register
from childtuning.methods.whole import WholeParameters, output_names, train_only
from childtuning.training import Prepared


@register
@dataclass(frozen=True)
class Head(WholeParameters):
    """The new head, or the output layer of a network without a new one: a linear probe of the pretrained features."""

    name = "head"
    summary = "train the last layer only, on frozen features"
    source = "—"
    trains = "the new head"
    excludes: ClassVar[Mapping[str, str]] = {
        "mixout": "only the head is trained, and mixout mixes pretrained weights",
        "llrd": "there is one layer to train, so that no rate decays over layers",
    }
    chooses = True
    acts_on_pretrained = True

    def prepare(self, prepared: Prepared) -> Prepared:
        """Leave the head alone to be trained."""
        return train_only(prepared, () if prepared.always else output_names(prepared.model))
