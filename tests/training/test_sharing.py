"""A process's share of a batch: the model sees nothing but its inputs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from childtuning.ranks import Ranks
from childtuning.training import sharing


class Divides(nn.Module):
    """A loss that is a sum divided by the items; it takes no argument that it does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 1)

    def forward(
        self, x: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor
    ) -> dict[str, Any]:
        return {"loss": (self.line(x).squeeze(1) - labels).square().sum() / num_items_in_batch}


def test_whether_a_loss_divides_by_items_is_asked_without_the_mark() -> None:
    from contextlib import nullcontext

    trainer = SimpleNamespace(
        args=SimpleNamespace(gradient_accumulation_steps=1, world_size=2),
        label_smoother=None,
        compute_loss_func=None,
        model_accepts_loss_kwargs=True,
        bare_model=Divides(),
        compute_loss_context_manager=nullcontext,
        _prepare_inputs=lambda inputs: inputs,
    )
    inputs = {
        "x": torch.ones(2, 3),
        "labels": torch.ones(2),
        sharing._COUNTS: torch.ones(2, dtype=torch.bool),
    }
    assert sharing.divides_by_items(trainer, inputs)


def test_shares_cover_each_batch_once() -> None:
    batches = [[5, 3, 8], [1], [2, 4]]

    class Of(Ranks):
        size = property(lambda self: 2)  # type: ignore[assignment]
        rank = property(lambda self: self.group)  # type: ignore[assignment]

    shares = [list(sharing._Shares(batches, Of(rank))) for rank in (0, 1)]  # type: ignore[arg-type]
    for batch, first, second in zip(batches, *shares, strict=True):
        assert sorted(i for i in first + second if i >= 0) == sorted(batch)
    assert shares[1][1] == [~1]  # nothing of it: an example that does not count
