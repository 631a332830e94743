"""What is trained of one weight at the moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from childtuning.part import Part
from childtuning.structured.groups import Group, part_groups


@dataclass(eq=False)
class Trained:
    """The trained entries of one weight, and the leaf that collects their gradient.

    A structured layer reads both at every forward pass, so either may be replaced between steps.

    Args:
        groups: where rows meet columns, see ``part_groups``; tensors on the weight's device.
        leaf: flat [n], requires grad. Only its ``.grad`` matters: the gradients of the n trained entries, group by
            group and row-major. Its data is never read, so it may be one number expanded.
        weight: the weight that it is of, once installed.
    """

    groups: Sequence[Group]
    leaf: Tensor
    weight: Tensor | None = field(default=None, repr=False)

    def __reduce__(self) -> tuple[type[Trained], tuple[list[Group], Tensor]]:
        """Copy as what is of no weight: nobody waits for the gradient of a copied layer's leaf."""
        return type(self), ([], torch.empty(0))

    @classmethod
    def from_part(cls, part: Part, weight: Tensor, dtype: torch.dtype | None = None) -> Self | None:
        """Return what a part trains, with a leaf that takes no memory; ``None`` if it has no structure.

        Args:
            part: of the weight's shape.
            weight: gives the device.
            dtype: the gradient's; default the weight's.
        """
        groups = part_groups(part, weight.device)
        if groups is None:
            return None
        one = torch.empty(1, dtype=dtype or weight.dtype, device=weight.device)
        return cls(groups, one.expand(part.num_trained).requires_grad_())

    @property
    def wanted(self) -> Tensor | None:
        """The leaf, or ``None`` if nothing is trained: then no layer stores its input for it."""
        return self.leaf if self.leaf.numel() else None
