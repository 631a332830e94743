"""Embeddings. Shapes: N tokens, V vocabulary, H width, r chosen rows, n trained entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from childtuning.structured.groups import Chosen, Group, join, take
from childtuning.structured.registry import StructuredLayer, register_structured
from childtuning.structured.trained import Trained


class _Lookup(Function):
    """``y = W[tokens]``, and of the gradient of W only the groups."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,  # [N]
        weight: Tensor,  # [V, H]
        leaf: Tensor | None,  # [n]
        groups: Sequence[Group],
        padding_idx: int | None,
    ) -> Tensor:
        ctx.groups, ctx.padding_idx, ctx.size = groups, padding_idx, weight.shape[0]
        ctx.save_for_backward(tokens)
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:  # [N, H]
        (tokens,) = ctx.saved_tensors

        def gradient(rows: Chosen, columns: Chosen) -> Tensor:
            places, r = _places(tokens, rows, ctx.size, ctx.padding_idx)
            # Torch's own kernel, for a vocabulary of the r chosen rows and one to which nothing is added.
            return torch.ops.aten.embedding_dense_backward(take(dY, columns), places, r + 1, r, False)[:r]

        return None, None, join(gradient(*group) for group in ctx.groups), None, None


def _places(tokens: Tensor, rows: Chosen, size: int, padding_idx: int | None) -> tuple[Tensor, int]:
    """Return each token's place among the r chosen rows, r for a token that has none; and r."""
    if isinstance(rows, Tensor):
        r = len(rows)
        places = torch.searchsorted(rows, tokens).clamp(max=r - 1)
        chosen = rows[places] == tokens
    else:
        start, stop = (rows.start, rows.stop) if rows else (0, size)
        r, places = stop - start, tokens - start
        chosen = (places >= 0) & (places < r)
    if padding_idx is not None:
        chosen &= tokens != padding_idx
    return torch.where(chosen, places, r), r


@register_structured(nn.Embedding)
class StructuredEmbedding(StructuredLayer, nn.Embedding):
    """An embedding whose gradient is that of the chosen tokens' rows."""

    @staticmethod
    def fits(module: nn.Module, trained: Trained) -> bool:
        """Refuse what rescales or sparsifies, and tiles: each group is one pass over all tokens."""
        return (
            isinstance(module, nn.Embedding)
            and module.max_norm is None
            and not (module.scale_grad_by_freq or module.sparse)
            and len(trained.groups) <= 1
        )

    def forward(self, input: Tensor) -> Tensor:
        """Look the tokens up: [...] -> [..., H]."""
        if not self.in_use:
            return super().forward(input)
        trained = self.trained_weight
        y = _Lookup.apply(
            input.reshape(-1).long(), self.weight.detach(), trained.wanted, trained.groups, self.padding_idx
        )
        return y.view(*input.shape, self.embedding_dim)
