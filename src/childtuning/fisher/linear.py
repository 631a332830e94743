"""Linear layers. Shapes: B examples, T tokens, I in, O out."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from childtuning.fisher.gradients import Dense, ExampleGradients, Outer
from childtuning.fisher.rules import own_parameters, rule


def _tokens(x: Tensor) -> Tensor:
    """[B, …, D] -> [B, T, D]."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)


@rule(nn.Linear)
def linear(module: nn.Module, x: Tensor, dY: Tensor) -> dict[str, ExampleGradients]:
    """weight [O, I]: ``einsum('bto,bti->boi', dY, x)``; bias [O]: ``einsum('bto->bo', dY)``."""
    x, dY = _tokens(x), _tokens(dY)
    return {"weight": Outer(dY, x), "bias": Dense(dY.sum(1))}


def _is_conv1d(module: Any) -> bool:
    """Hugging Face's Conv1D, a linear layer with weight [I, O], without importing transformers."""
    return (
        type(module).__name__ == "Conv1D"
        and own_parameters(module) == {"weight", "bias"}
        and module.weight.dim() == 2
        and module.bias.shape == module.weight.shape[1:]
    )


@rule(_is_conv1d)
def transposed_linear(module: nn.Module, x: Tensor, dY: Tensor) -> dict[str, ExampleGradients]:
    """weight [I, O]: ``einsum('bti,bto->bio', x, dY)``; bias [O]: ``einsum('bto->bo', dY)``."""
    x, dY = _tokens(x), _tokens(dY)
    return {"weight": Outer(x, dY), "bias": Dense(dY.sum(1))}
