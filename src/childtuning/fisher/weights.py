"""How much each example weighs in the loss of a batch: L = Σ_b w_b ℓ_b, ℓ_b the loss of example b alone.

Shapes: B examples, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from childtuning.errors import DataError
from childtuning.fisher.batches import IGNORED_LABEL, class_labels, is_token_level

_MOST_CLASSES = 256  # more values than these are no classes that a loss may weigh

Weighting = Callable[[Any, int], "Tensor | None"]


def mean_of_examples(batch: Any, size: int) -> Tensor:
    """w_b = 1/B."""
    return torch.full((size,), 1.0 / size, dtype=torch.float64)


def sum_of_examples(batch: Any, size: int) -> Tensor:
    """w_b = 1."""
    return torch.ones(size, dtype=torch.float64)


def mean_of_labels(batch: Any, size: int) -> Tensor | None:
    """w_b = n_b / Σ n, n_b the labels of example b that are not −100."""
    return _share_of_labels(batch, size, first=0)


def mean_of_next_labels(batch: Any, size: int) -> Tensor | None:
    """The same for causal language models, where no output predicts the first label."""
    return _share_of_labels(batch, size, first=1)


def _share_of_labels(batch: Any, size: int, first: int) -> Tensor | None:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not is_token_level(labels) or len(labels) != size:
        return None
    counts = (labels[:, first:] != IGNORED_LABEL).sum(1).double().cpu()
    return counts / counts.sum().clamp(min=1)


class ExampleWeights:
    """The weightings that fit the losses seen so far; the first that fits is used.

    Args:
        own_loss: whether the model computes its loss itself; a user's ``loss_fn`` is first taken for a batch mean.
        shifted: whether its labels are shifted by one.
    """

    def __init__(self, *, own_loss: bool, shifted: bool) -> None:
        by_label = [mean_of_next_labels, mean_of_labels] if shifted else [mean_of_labels, mean_of_next_labels]
        self.candidates: list[Weighting] = [mean_of_examples, sum_of_examples]
        self.candidates = [*by_label, *self.candidates] if own_loss else [*self.candidates, *by_label]
        self.group_of: dict[Hashable, int] = {}  # classes whose examples were weighed together share a number

    def fit(self, batch: Any, loss: Tensor, losses: Sequence[float]) -> bool:
        """Keep the weightings under which the examples' losses give the batch's; tell whether there are any."""
        alone = torch.tensor(losses, dtype=torch.float64)
        tolerance = max(1e-4, 4 * torch.finfo(loss.dtype).eps) if loss.dtype != torch.float64 else 1e-8
        self.candidates = [
            candidate
            for candidate in self.candidates
            if (weights := candidate(batch, len(losses))) is not None
            and abs(float(weights @ alone) - float(loss.detach())) <= tolerance * float(weights @ alone.abs())
        ]
        met = class_labels(batch, len(losses))
        groups = {self.group_of.get(label) for label in met} - {None}
        number = 1 + max(self.group_of.values(), default=0)
        self.group_of |= {label: number for label, group in self.group_of.items() if group in groups}
        self.group_of |= dict.fromkeys(met, number)
        return bool(self.candidates)

    def strangers(self, batch: Any, size: int) -> list[int]:
        """Return an example of each class, or set of classes, that no loss has been seen to weigh beside the others.

        A loss may weigh classes unlike each other, which batches of one class do not show.
        """
        if len(self.group_of) > _MOST_CLASSES:
            return []
        found: dict[Hashable, int] = {}
        for index, label in enumerate(class_labels(batch, size)):
            found.setdefault(
                ("met", self.group_of[label]) if label in self.group_of else ("new", label), index
            )
        return list(found.values()) if len(found) > 1 else []

    def differ(self, batch: Any, size: int) -> bool:
        """Tell whether the weightings still in question disagree on this batch."""
        found = [weights for candidate in self.candidates if (weights := candidate(batch, size)) is not None]
        return any(not torch.allclose(weights, found[0]) for weights in found[1:])

    def __call__(self, batch: Any, size: int) -> Tensor:
        """Return w [B], float64, on the host.

        Raises:
            DataError: an example weighs nothing, so that alone it would have no loss.
        """
        for candidate in self.candidates:
            weights = candidate(batch, size)
            if weights is not None:
                if not bool((weights > 0).all()):
                    raise DataError("the loss of an example without any label is nan. Check the labels.")
                return weights
        return mean_of_examples(batch, size)
