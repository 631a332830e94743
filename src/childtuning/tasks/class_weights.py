"""Class weights: a cross entropy in which rare classes count as much as frequent ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


class BalancedLoss:
    """Cross entropy in which an example of class c has the weight w_c = n / (k · n_c).

    ℓ = 1/B Σ_b w_{y_b} · (−log p(y_b)), with n training examples, n_c of them of class c, and k classes. [King and Zeng
    2001; scikit-learn's ``class_weight="balanced"``] The mean weight over the training examples is 1, and B counts the
    examples, so that the loss of one example keeps its weight.

    Args:
        truth: the class id of each training example.
        num_classes: k; a class without examples does not count.
    Example:
        >>> BalancedLoss([0, 0, 0, 1], 2).weights.tolist()
        [0.6666666865348816, 2.0]
    """

    def __init__(self, truth: Sequence[int], num_classes: int) -> None:
        counts = np.bincount(truth, minlength=num_classes)
        num_there = int((counts > 0).sum())
        self.weights = torch.as_tensor(
            len(truth) / (num_there * counts.clip(1)), dtype=torch.float32, device="cpu"
        )

    def __call__(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Return the loss; with ``num_items_in_batch``, the sum is divided by it, as transformers' Trainer asks for."""
        logits = outputs["logits"].float()
        losses = cross_entropy(
            logits, labels.view(-1), weight=self.weights.to(logits.device), reduction="sum"
        )
        return losses / (labels.numel() if num_items_in_batch is None else num_items_in_batch)
