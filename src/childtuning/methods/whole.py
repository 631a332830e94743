"""Methods that train whole parameters, chosen by where they stand: full, head, last-k, bitfit, freeze."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from childtuning.child import ChildConfig
from childtuning.child.eligible import named
from childtuning.errors import ConfigError, ModelError
from childtuning.methods.checks import check_layers
from childtuning.methods.registry import register
from childtuning.training import Method, Prepared, find_layers


class WholeParameters(Method):
    """A method whose child consists of whole parameters: nothing is chosen entry by entry."""

    memory = "2n state"
    part = "child"

    def child(self, config: ChildConfig) -> ChildConfig:
        """Return the child that is whole.

        Raises:
            ConfigError: a density was given.
        """
        if config.density != 1.0:
            raise ConfigError(
                f"method {self.name!r} trains parameters whole, got density {config.density}. Leave it out."
            )
        return replace(config, variant="task-driven", rescale=False)


def output_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a network's output layer: its output embeddings, or the last module with parameters.

    Output embeddings that are tied to the input's are trained as both.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is None:
        owners = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
        output = owners[-1]
    inside = {id(parameter) for parameter in output.parameters()}
    return tuple(name for name, p in named(model).items() if id(p) in inside)


def train_only(prepared: Prepared, names: Iterable[str]) -> Prepared:
    """Return the prepared model with these parameters, as far as they are eligible, and what is always trained.

    Raises:
        ModelError: that would be nothing.
    """
    wanted = set(names)
    plain = named(prepared.model)
    if prepared.eligible is not None:
        wanted &= set(prepared.eligible)
    eligible = tuple(name for name in plain if name in wanted and name not in prepared.always)
    if not eligible and not prepared.always:
        raise ModelError("nothing would be trained. Name parameters with always, or use another method.")
    return replace(prepared, eligible=eligible)


@register
@dataclass(frozen=True)
class Full(WholeParameters):
    """Every parameter that requires a gradient, by the inner optimizer as it is: the child is the network itself."""

    name = "full"
    summary = "train every parameter (vanilla fine-tuning)"
    source = "—"
    trains = "everything"


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
