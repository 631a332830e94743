"""Bottleneck adapters: find the projections of a Transformer layer by its structure, and insert adapters.

Shapes: … batch and tokens, d hidden size, m bottleneck.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}
_ATTRIBUTE = "bottleneck"
_START_SD = 1e-3


class Bottleneck(nn.Module):
    """up(activation(down(h))): [..., d] -> [..., d], zero at the start.

    Example:
        >>> import torch
        >>> bottleneck = Bottleneck(4, 2, "gelu")
        >>> bottleneck(torch.ones(1, 4))
        tensor([[0., 0., 0., 0.]], grad_fn=<AddmmBackward0>)
    """

    def __init__(self, width: int, size: int, activation: str, like: Tensor | None = None) -> None:
        super().__init__()
        options: dict[str, Any] = {} if like is None else {"device": like.device, "dtype": like.dtype}
        self.down = nn.Linear(width, size, **options)
        self.activation = ACTIVATIONS[activation]()
        self.up = nn.Linear(size, width, **options)
        nn.init.normal_(self.down.weight, std=_START_SD)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, h: Tensor) -> Tensor:
        """Apply it."""
        return self.up(self.activation(self.down(h)))


@dataclass(frozen=True)
class Projections:
    """The projections with which a Transformer layer writes to its residual stream.

    Attributes:
        width: d.
        feed_forward: the feed-forward's output projection.
        attention: the output projection of the attention (the last one if there are several); ``None`` if it is not a
            linear layer, or cannot be distinguished from the feed-forward's input projection.
        norms: the normalisations of width d.
    """

    width: int
    feed_forward: nn.Module
    attention: nn.Module | None
    norms: tuple[nn.Module, ...]


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is called as a linear layer: a Linear, or GPT-2's Conv1D.

    The output projection of torch's own attention is excluded: its forward is never called.
    """
    return isinstance(module, (nn.Linear, Conv1D)) and not isinstance(module, NonDynamicallyQuantizableLinear)


def find_projections(block: nn.Module) -> Projections | None:
    """Find the output projections of a Transformer layer.

    The first linear layer of a block reads the residual stream, so its input size is d. The feed-forward's
    output projection is the block's last linear layer, from another size to d. The attention's is the last linear
    layer before it with output size d, unless the feed-forward itself has width d.

    Returns:
        ``None`` if the output size of the last linear layer is not d, or if it is the only one.

    Example:
        >>> attention = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        >>> block = nn.ModuleList([attention, nn.Linear(4, 8), nn.Linear(8, 4), nn.LayerNorm(4)])
        >>> found = find_projections(block)
        >>> found.feed_forward is block[2], found.attention is attention[1], found.norms == (block[3],)
        (True, True, True)
    """
    layers = [
        (module, *_sizes(module)) for module in block.modules() if is_linear(module) and module is not block
    ]
    if len(layers) < 2:
        return None
    width = layers[0][1]
    feed_forward, inner, out = layers[-1]
    if out != width:
        return None
    back = [module for module, _, size in layers[:-1] if size == width] if inner != width else []
    norms = tuple(module for module in block.modules() if _is_norm(module, width))
    return Projections(width, feed_forward, back[-1] if back else None, norms)


def insert(projection: nn.Module, size: int, activation: str) -> Bottleneck:
    """Add a bottleneck to a projection's output: y becomes y + bottleneck(y).

    It is a submodule of the projection, whose parameters keep their names. Copies of the model include it.
    """
    weight = projection.weight
    assert isinstance(weight, Tensor)
    bottleneck = Bottleneck(_sizes(projection)[1], size, activation, like=weight)
    projection.add_module(_ATTRIBUTE, bottleneck)
    projection.register_forward_hook(_add)
    return bottleneck


def _add(module: Any, args: tuple, y: Tensor) -> Tensor:
    return y + getattr(module, _ATTRIBUTE)(y)


def _sizes(module: Any) -> tuple[int, int]:
    """Input and output size."""
    sizes = module.weight.shape
    return (sizes[0], sizes[1]) if isinstance(module, Conv1D) else (sizes[1], sizes[0])


def _is_norm(module: nn.Module, width: int) -> bool:
    own = list(module.parameters(recurse=False))
    alone = next(module.children(), None) is None
    return bool(own) and alone and all(parameter.shape == torch.Size([width]) for parameter in own)
