"""bitfit: the biases and the head are trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from childtuning.child.eligible import named
from childtuning.errors import ModelError
from childtuning.methods.registry import register
from childtuning.methods.whole import WholeParameters, train_only
from childtuning.training import Prepared


@register
@dataclass(frozen=True)
class BitFit(WholeParameters):
    """Every bias, those of norms among them, and the head. [Ben Zaken et al. 2022]"""

    name = "bitfit"
    summary = "train the biases and the head"
    source = "Ben Zaken et al. 2022, arXiv 2106.10199"
    trains = "the biases and the head"
    excludes: ClassVar[Mapping[str, str]] = {
        "mixout": "only biases are trained, and mixout mixes weights",
    }
    chooses = True
    acts_on_pretrained = True

    def prepare(self, prepared: Prepared) -> Prepared:
        """Freeze everything that is no bias.

        Raises:
            ModelError: the network has none.
        """
        names = named(prepared.model)
        biases = [n for n in names if n.rpartition(".")[2].endswith("bias") and n not in prepared.always]
        if not biases:
            raise ModelError(
                "bitfit trains biases, and this model's pretrained layers have none. Use another method."
            )
        return train_only(prepared, biases)
