"""Hugging Face's Conv1D of GPT-2, a linear layer with weight [I, O]; recognised by name, never imported."""

from __future__ import annotations

from torch import Tensor

from childtuning.structured.linear import product
from childtuning.structured.registry import StructuredLayer, register_structured


@register_structured("transformers.pytorch_utils.Conv1D")
class StructuredConv1D(StructuredLayer):
    """A Conv1D whose weight gradient is ``x[:, rows]ᵀ dY[:, columns]`` for each group."""

    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: [..., I] -> [..., O]."""
        if not self.in_use:
            return super().forward(x)
        return product(x, self.weight.t(), self.bias, self.trained_weight, transposed=True)
