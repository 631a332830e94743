"""Linear layers whose weight is mixed with its initial value during training, in place of dropout.

Shapes: … batch and tokens, I in, O out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd
from transformers.pytorch_utils import Conv1D


class _Mixed(nn.Module):
    """A linear layer that keeps its initial weight W0 besides its weight W.

    In training it uses W' = [(1−B) W0 + B W − p W0] / (1−p) with B ~ Bernoulli(1−p) for each entry and call. This
    equals W0 + B (W − W0) / (1−p) and is computed as dropout of the difference; autograd's gradient is exact,
    dW = B / (1−p) dW'.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    start_weight: Tensor
    mixed_share: float

    def mixed_weight(self) -> Tensor:
        """Return W' with a new mask."""
        return self.start_weight + F.dropout(self.weight - self.start_weight, self.mixed_share)

    @property
    def mixes(self) -> bool:
        """Whether W' differs from W: false in evaluation, and if W is frozen and so equals W0."""
        return self.training and self.weight.requires_grad


class _MixedLinear(_Mixed):
    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer: [..., I] -> [..., O]."""
        return F.linear(input, self.mixed_weight(), self.bias) if self.mixes else super().forward(input)


class _MixedConv1D(_Mixed):
    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: [..., I] -> [..., O]; the weight is [I, O]."""
        return F.linear(x, self.mixed_weight().t(), self.bias) if self.mixes else super().forward(x)


@cache
def _mixed_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that replaces ``cls``; it has the same name, since some layers are recognised by name."""
    mixed = _MixedLinear if cls is nn.Linear else _MixedConv1D
    return cast("type[nn.Module]", type(cls.__name__, (mixed, cls), {}))


@dataclass(eq=False)
class MixedLayers:
    """The changes made by ``mix``.

    Args:
        start: the initial weight W0 by the name of the module; it stays after ``remove``.
    """

    start: dict[str, Tensor]
    _layers: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list, repr=False)
    _dropouts: list[tuple[nn.Module, str, float]] = field(default_factory=list, repr=False)

    def remove(self) -> None:
        """Restore every layer's class and dropout; safe to call twice."""
        for module, cls in self._layers:
            del module.start_weight, module.mixed_share
            module.__class__ = cls
        for module, attribute, share in self._dropouts:
            setattr(module, attribute, share)
        self._layers.clear()
        self._dropouts.clear()


def mixable(model: nn.Module, without: Container[str] = ()) -> dict[str, nn.Module]:
    """Return path -> linear layer, for those whose weight is used by no other module and is not in ``without``.

    Only layers of exactly the class ``Linear`` or GPT-2's ``Conv1D``: others may use their weight differently.
    """
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return {
        path: module
        for path, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D)
        and uses[id(module.weight)] == 1
        and (f"{path}.weight" if path else "weight") not in without
    }


def mix(
    model: nn.Module,
    p: float,
    without: Container[str] = (),
    start: Mapping[str, Tensor] = MappingProxyType({}),
) -> MixedLayers:
    """Mix the weights of a model's linear layers with their initial values, and set its dropout to zero.

    Only the class of the layers changes, so that names, state dict and hooks stay the same; the initial weight is a
    non-persistent buffer. Dropout means ``Dropout`` modules, and float attributes of modules with "dropout" in
    their name, as in attention modules; rates that a forward pass reads from the configuration are not changed.

    Args:
        p: the share of entries that have the initial value in each call, in (0, 1).
        without: names of parameters that are not mixed.
        start: the initial weight by the name of the module; where there is none, the current one.
    """
    layers = mixable(model, without)
    mixed = MixedLayers({}, [(module, type(module)) for module in layers.values()])
    for name, module in layers.items():
        mixed.start[name] = _start(module, p, start.get(name))
    for module in model.modules():
        for attribute, share in _dropouts(module):
            mixed._dropouts.append((module, attribute, share))
            setattr(module, attribute, 0.0)
    return mixed


def _start(module: Any, p: float, start: Tensor | None) -> Tensor:
    weight = module.weight.detach()
    initial = weight.clone() if start is None else start.to(weight)
    module.register_buffer("start_weight", initial, persistent=False)
    module.mixed_share = p
    module.__class__ = _mixed_class(type(module))
    return initial


def _dropouts(module: nn.Module) -> list[tuple[str, float]]:
    if isinstance(module, _DropoutNd):
        return [("p", module.p)]
    own = vars(module).items()
    return [(name, value) for name, value in own if "dropout" in name and type(value) is float and value]
