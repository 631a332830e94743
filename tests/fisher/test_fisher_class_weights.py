"""Losses that weigh classes are seen through, also where the first batch shows one class only."""

from __future__ import annotations

import warnings

import pytest
import torch
from tests.reference.fisher_loop import per_example
from torch import nn
from torch.nn import functional as F

from childtuning.fisher import fisher_information

CLASSES = {
    "one class first": [[0, 0, 0, 0], [0, 1, 2, 1]],
    "each class alone, then all": [[0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 2, 2], [0, 1, 2, 2]],
    "alike classes first": [[0, 1, 0, 1], [0, 1, 2, 1]],
    "a pair, another pair, then across": [[0, 1, 0, 1], [2, 3, 2, 3], [0, 2, 1, 3]],
}
WEIGHTS = torch.tensor([1.0, 1.0, 5.0, 5.0], dtype=torch.float64)


def weighted(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], weight=WEIGHTS)


@pytest.mark.parametrize("labels", CLASSES.values(), ids=CLASSES)
def test_class_weights_are_noticed(labels) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    batches = [(torch.randn(4, 5, dtype=torch.float64), torch.tensor(row)) for row in labels]
    with pytest.warns(UserWarning, match="no weighted mean"):
        found = fisher_information(net, batches, weighted)
    wanted = per_example(net, batches, weighted)
    for name, score in found.items():
        torch.testing.assert_close(score, wanted[name])


def test_an_unweighted_loss_stays_with_the_layer_wise_pass() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
    batches = [(torch.randn(4, 5), torch.tensor(row)) for row in CLASSES["each class alone, then all"]]
    calls = []

    def loss_fn(model, batch):
        calls.append(len(batch[0]))
        return F.cross_entropy(model(batch[0]), batch[1])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fisher_information(net, batches * 3, loss_fn)
    # alone and as a pair; four batches, in the last of which three classes are compared; and they again, twice
    assert calls == [1, 1, 2, 4, 4, 4, 1, 1, 1, 3, 4] + [4] * 8
