"""reinit: re-initialise the top layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from childtuning.child.eligible import named
from childtuning.errors import ConfigError, ModelError
from childtuning.methods.checks import check_layers, layers_of, not_for
from childtuning.methods.registry import register
from childtuning.methods.whole import output_names
from childtuning.training import Layers, Method, Prepared, task_head

Initialise = Callable[[Any], object]


@register
@dataclass(frozen=True)
class Reinit(Method):
    """Re-initialise the top layers, and any modules between them and the head (a pooler).

    They are initialised as before pretraining, and trained in full. [Zhang et al. 2021] Other parameters of the module
    that contains the layers are kept: a final norm, or a part shared by all layers. The paper also recommends AdamW
    with bias correction, which this library's AdamW has, and more steps (``epochs``).

    Args:
        layers: the number of layers; 0 for the pooler only.
    """

    layers: int = 2

    name = "reinit"
    summary = "re-initialise the top layers and the pooler before training"
    source = "Zhang et al. 2021, arXiv 2006.05987"
    trains = "as set by the other methods, and the new layers in full"
    memory = "—"
    part = "start"
    redraws = True
    acts_on_pretrained = True

    def __post_init__(self) -> None:
        if self.layers < 0:
            raise ConfigError(
                f"layers of 'reinit' must not be negative, got {self.layers}. Pass 0 for the pooler only."
            )

    def prepare(self, prepared: Prepared) -> Prepared:
        """Re-initialise the layers.

        Raises:
            ModelError: when the model has fewer layers, or one of them cannot be initialised.
        """
        model, found = prepared.model, layers_of(self.name, prepared.model)
        head = {*prepared.always, *task_head(model)}
        if getattr(model, "get_output_embeddings", lambda: None)() is not None:
            head |= set(output_names(model))
        layers = [layer for layer in found.layers if not head.issuperset(layer)]
        check_layers(self.name, self.layers, len(layers))
        plain = named(model)
        drawn = {name for layer in layers[len(layers) - self.layers :] for name in layer}
        drawn |= {name for name in _behind(model, found) if name not in head}
        new = tuple(name for name in plain if name in drawn)
        if not new:
            raise ModelError("reinit:0 re-initialises the pooler, but the model has none. Pass at least 1.")
        _draw(model, {name: plain[name] for name in new})
        always = (*prepared.always, *(name for name in new if name not in prepared.always))
        eligible = prepared.eligible
        if eligible is not None:
            eligible = tuple(name for name in eligible if name not in always)
        return replace(prepared, always=always, eligible=eligible, redrawn=(*prepared.redrawn, *new))


def _behind(model: nn.Module, found: Layers) -> list[str]:
    """The parameters after the module that contains the layers; its own parameters may be shared by all layers."""
    last = next(path for path, module in model.named_modules() if module is found.blocks[-1])
    holder = ".".join(last.split(".")[:-2])
    return [name for name in found.after if not holder or not name.startswith(holder + ".")]


@torch.no_grad()
def _draw(model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    """Initialise every module whose parameters are all among these, inner modules first."""
    wanted = {id(parameter) for parameter in parameters.values()}
    before = {name: parameter.clone() for name, parameter in parameters.items()}
    drawn = [
        (module, initialise)
        for module, initialise in reversed(list(_initialisers(model)))
        if (own := [id(parameter) for parameter in module.parameters()]) and wanted.issuperset(own)
    ]
    buffers = [buffer for module, _ in drawn for buffer in module.buffers(recurse=False)]
    tensors = [*parameters.values(), *buffers]
    flags = [(tensor, vars(tensor).pop("_is_hf_initialized", None)) for tensor in tensors]
    for module, _ in drawn:  # an architecture's own initialiser leaves out what is right in a new module
        _reset(module)
    for module, initialise in drawn:
        initialise(module)
    for tensor, flag in flags:
        if flag is not None:
            tensor._is_hf_initialized = flag  # type: ignore[attr-defined]
    for name, parameter in parameters.items():
        if parameter.ndim > 1 and torch.equal(parameter, before[name]):
            raise not_for("reinit", model, f"the module of {name!r} has no method reset_parameters")


def _initialisers(model: nn.Module) -> Iterator[tuple[nn.Module, Initialise]]:
    """Every module and its initialiser: of the transformers model that contains it, else its own."""
    from transformers import PreTrainedModel

    def visit(module: nn.Module, initialise: Initialise) -> Iterator[tuple[nn.Module, Initialise]]:
        if isinstance(module, PreTrainedModel):
            initialise = module._init_weights
        yield module, initialise
        for child in module.children():
            yield from visit(child, initialise)

    return visit(model, _reset)


def _reset(module: Any) -> None:
    getattr(module, "reset_parameters", getattr(module, "_reset_parameters", lambda: None))()
