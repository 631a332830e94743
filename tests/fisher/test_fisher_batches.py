"""Batches of every shape are taken apart and put together as what they were."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import childtuning as ct


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@pytest.mark.parametrize(
    "make", [Pair, lambda x, y: (x, y), lambda x, y: [x, y]], ids=["named", "tuple", "list"]
)
def test_scores_do_not_depend_on_the_kind_of_sequence(make) -> None:
    torch.manual_seed(0)
    line = torch.nn.Linear(3, 1)
    x, y = torch.randn(5, 3), torch.randn(5, 1)

    def loss(model: torch.nn.Module, batch) -> Tensor:
        assert type(batch) is type(make(x, y))
        return 0.5 * (model(batch[0]) - batch[1]).square().mean()

    scores = ct.fisher_information(line, [make(x, y)], loss, "mean")
    residual = (line(x) - y).detach()
    torch.testing.assert_close(scores["weight"], (residual * x).square().mean(0, keepdim=True))
