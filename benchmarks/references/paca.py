"""PaCA: random input columns of every linear layer, trained where they lie [Woo et al. 2025].

A layer keeps the chosen columns of its input alone for the backward pass, and its gradient is theirs alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

SHARE = (
    0.13  # of the columns: about as many entries as a child of 0.1 of BERT-base, whose embeddings count too
)


class _PartialProduct(Function):
    """``y = x Wᵀ + b``, with the gradient of the chosen columns of W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, columns: Tensor, weight: Tensor, bias: Tensor, chosen: Tensor) -> Tensor:
        ctx.save_for_backward(x.flatten(0, -2).index_select(1, chosen), weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dY,) = gradients
        x, weight = ctx.saved_tensors
        return dY @ weight, dY.flatten(0, -2).t() @ x, None, None, None


class PacaLinear(nn.Module):
    """A frozen linear layer some of whose columns are a parameter of their own."""

    def __init__(self, layer: nn.Linear, share: float) -> None:
        super().__init__()
        count = max(1, round(share * layer.in_features))
        self.chosen = torch.randperm(layer.in_features)[:count].sort().values
        self.weight, self.bias = layer.weight.requires_grad_(False), layer.bias.requires_grad_(False)
        self.columns = nn.Parameter(layer.weight.detach()[:, self.chosen].clone())

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        with torch.no_grad():
            self.weight[:, self.chosen] = self.columns
        return _PartialProduct.apply(x, self.columns, self.weight, self.bias, self.chosen)  # type: ignore[return-value]


def paca(model: Any, share: float = SHARE) -> nn.Module:
    """Replace every linear layer but the head, which is trained whole; all else is frozen."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier"))
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not path.startswith("classifier"):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, PacaLinear(module, share))
    return model
