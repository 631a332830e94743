"""Methods that train whole parameters, chosen by their place: full, head, last-k, bitfit, freeze."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from childtuning.child import ChildConfig
from childtuning.child.eligible import named
from childtuning.errors import ConfigError, ModelError
from childtuning.methods.checks import check_layers, layers_of
from childtuning.methods.registry import register
from childtuning.training import Method, Prepared, task_head


class WholeParameters(Method):
    """A method whose child consists of whole parameters, without a choice of entries."""

    memory = "2n state"
    part = "child"
    shards = True

    def child(self, config: ChildConfig) -> ChildConfig:
        """Return the configuration of a child of whole parameters.

        Raises:
            ConfigError: when a density is given.
        """
        if config.density != 1.0:
            raise ConfigError(
                f"method {self.name!r} trains whole parameters, got density {config.density}. Leave it out."
            )
        return replace(config, variant="task-driven", rescale=False)


def output_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a network's output layer: its output embeddings, or the last module with parameters.

    Output embeddings may be tied to the input embeddings; both are then trained.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is None:
        owners = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
        output = owners[-1]
    inside = {id(parameter) for parameter in output.parameters()}
    return tuple(name for name, p in named(model).items() if id(p) in inside)


def train_only(prepared: Prepared, names: Iterable[str]) -> Prepared:
    """Restrict the eligible parameters of a prepared model to these names.

    Raises:
        ModelError: when no parameter would be trained.
    """
    wanted = set(names)
    plain = named(prepared.model)
    if prepared.eligible is not None:
        wanted &= set(prepared.eligible)
    eligible = tuple(name for name in plain if name in wanted and name not in prepared.always)
    if not eligible and not prepared.always:
        raise ModelError("nothing would be trained. Name parameters with always, or use another method.")
    return replace(prepared, eligible=eligible)


def with_head(prepared: Prepared) -> tuple[str, ...]:
    """Return what is trained in full, with the task's head also where it is a pretrained one."""
    return prepared.always if prepared.head else (*prepared.always, *task_head(prepared.model))


@register
@dataclass(frozen=True)
class Full(WholeParameters):
    """Train every parameter that requires a gradient, with the inner optimizer: the child is the whole network."""

    name = "full"
    summary = "train every parameter (vanilla fine-tuning)"
    source = "—"
    trains = "everything"


@register
@dataclass(frozen=True)
class Head(WholeParameters):
    """Train the new head, or the output layer if there is none: a linear probe of the pretrained features."""

    name = "head"
    summary = "train the last layer only, on frozen features"
    source = "—"
    trains = "the new head"
    rate = 300.0
    excludes: ClassVar[Mapping[str, str]] = {
        "mixout": "only the head is trained, but mixout mixes pretrained weights",
        "llrd": "only one layer is trained, so that no rate decays over layers",
    }
    chooses = True
    acts_on_pretrained = True

    def prepare(self, prepared: Prepared) -> Prepared:
        """Freeze everything except the head."""
        return train_only(prepared, () if prepared.head else output_names(prepared.model))


@register
@dataclass(frozen=True)
class LastK(WholeParameters):
    """Top-K tuning: train the last k layers, everything after them, and the head; freeze everything before.

    Args:
        layers: k; counts the layers of a Transformer, or the blocks of a CNN.
    """

    layers: int = 3

    name = "last-k"
    summary = "train the last k layers and the head, freeze the rest (Top-K tuning)"
    source = "Houlsby et al. 2019, arXiv 1902.00751"
    trains = "the last k layers and the head"
    chooses = True
    acts_on_pretrained = True

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ConfigError(
                f"last-k trains at least 1 layer, got {self.layers}. To train only the head, use 'head'."
            )

    def prepare(self, prepared: Prepared) -> Prepared:
        """Freeze everything below the last k layers."""
        found = layers_of(self.name, prepared.model)
        check_layers(self.name, self.layers, len(found.layers))
        names = [name for layer in found.layers[-self.layers :] for name in layer]
        return train_only(prepared, [*names, *found.after])


@register
@dataclass(frozen=True)
class BitFit(WholeParameters):
    """Train every bias, including those of norms, and the head. [Ben Zaken et al. 2022]"""

    name = "bitfit"
    summary = "train the biases and the head"
    source = "Ben Zaken et al. 2022, arXiv 2106.10199"
    trains = "the biases and the head"
    rate = 50.0
    excludes: ClassVar[Mapping[str, str]] = {
        "mixout": "only biases are trained, but mixout mixes weights",
    }
    chooses = True
    acts_on_pretrained = True

    def prepare(self, prepared: Prepared) -> Prepared:
        """Freeze everything except biases.

        Raises:
            ModelError: when the network has no biases.
        """
        names = named(prepared.model)
        always = with_head(prepared)
        biases = [n for n in names if n.rpartition(".")[2].endswith("bias") and n not in always]
        if not biases:
            raise ModelError(
                "bitfit trains biases, but this model's pretrained layers have none. Use another method."
            )
        return train_only(replace(prepared, always=always), biases)


@register
@dataclass(frozen=True)
class Freeze(Method):
    """Freeze embeddings or stem, and the first layers; to be combined with methods that choose parameters.

    Args:
        layers: the number of layers after the embeddings; 0 freezes only the embeddings.
    """

    layers: int = 0

    name = "freeze"
    summary = "freeze the embeddings and the first layers (combine with other methods)"
    source = "—"
    trains = "—"
    memory = "—"
    part = "start"
    chooses = True
    acts_on_pretrained = True

    def __post_init__(self) -> None:
        if self.layers < 0:
            raise ConfigError(
                f"freeze needs a number of layers of at least 0, got {self.layers}. Pass 0 for only the embeddings."
            )

    def prepare(self, prepared: Prepared) -> Prepared:
        """Remove the frozen layers from the eligible parameters.

        Raises:
            ModelError: when the model has fewer layers.
        """
        found = layers_of(self.name, prepared.model)
        check_layers(self.name, self.layers, len(found.layers))
        frozen = {*found.before, *(name for layer in found.layers[: self.layers] for name in layer)}
        left = tuple(
            name for name in named(prepared.model) if name not in frozen and name not in prepared.always
        )
        return replace(prepared, eligible=left)
