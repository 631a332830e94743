"""Linear layers. Shapes: N examples times tokens, I in, O out, n trained entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from childtuning.structured.autocast import lowered
from childtuning.structured.groups import Group, join, take
from childtuning.structured.registry import StructuredLayer, register_structured
from childtuning.structured.trained import Trained


class _Product(Function):
    """``y = x Wᵀ + b``, and of ``dW = dYᵀ x`` only the groups."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [N, I]
        weight: Tensor,  # [O, I]
        bias: Tensor | None,  # [O]
        leaf: Tensor | None,  # [n]
        groups: Sequence[Group],
        transposed: bool,
    ) -> Tensor:
        ctx.groups, ctx.transposed = groups, transposed
        needs_x, _, _, needs_leaf, *_ = ctx.needs_input_grad
        # The weight as it is: autocast's copy of it is cheaper to make again than to keep.
        ctx.save_for_backward(x if needs_leaf else None, weight if needs_x else None)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:  # [N, O]
        x, weight = ctx.saved_tensors
        needs_x, _, needs_bias, needs_leaf, *_ = ctx.needs_input_grad
        dx = dbias = dleaf = None
        if needs_x:
            dx = dY @ weight.to(dY.dtype)
        if needs_bias:
            dbias = dY.sum(0)
        if needs_leaf:
            left, right = (x, dY) if ctx.transposed else (dY, x)
            dleaf = join(take(left, rows).t() @ take(right, columns) for rows, columns in ctx.groups)
        return dx, None, dbias, dleaf, None, None


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, trained: Trained, *, transposed: bool = False
) -> Tensor:
    """Return ``x Wᵀ + b`` for x [..., I] and W [O, I]; the groups are of W or, if transposed, of Wᵀ."""
    x = lowered(x)
    # Flat outside of the function: what one returns may be changed in place only if it is no view.
    y = _Product.apply(
        x.reshape(-1, x.shape[-1]), weight.detach(), bias, trained.wanted, trained.groups, transposed
    )
    return y.view(*x.shape[:-1], weight.shape[0])


@register_structured(nn.Linear)
class StructuredLinear(StructuredLayer, nn.Linear):
    """A Linear whose weight gradient is ``dY[:, rows]ᵀ x[:, columns]`` for each group."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer: [..., I] -> [..., O]."""
        if not self.in_use:
            return super().forward(input)
        return product(input, self.weight, self.bias, self.trained_weight)
