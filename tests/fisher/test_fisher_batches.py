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


def squared(model: torch.nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x)[:, 0] - y).square()


def by_hand(model: torch.nn.Module, losses: Tensor) -> Tensor:
    return (
        torch.stack([torch.autograd.grad(one, model.weight, retain_graph=True)[0] for one in losses])
        .square()
        .mean(0)
    )


def scored(batch: object, loss_fn) -> Tensor:
    return ct.fisher_information(line(), [batch], loss_fn)["weight"]


def line() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(3, 1)


@pytest.mark.usefixtures("fast")
def test_what_has_no_axis_or_length_one_is_shared() -> None:
    x, y, scale, power = torch.randn(5, 3), torch.randn(5), torch.tensor([2.0]), torch.tensor(0.5)
    batch = {
        "scale": scale,
        "deep": {"x": x, "more": [y, {"power": power}]},
        "name": "a",
        "size": (7, 7, 7, 7, 7),
    }

    def loss_fn(model, batch):
        assert batch["scale"].shape == (1,) and batch["size"] == (7, 7, 7, 7, 7)
        deep = batch["deep"]
        return squared(model, deep["x"], deep["more"][0]) / batch["scale"] * deep["more"][1]["power"]

    model = line()
    wanted = by_hand(model, squared(model, x, y) / 4)
    torch.testing.assert_close(scored(batch, loss_fn), wanted)


@pytest.mark.usefixtures("fast")
def test_a_list_with_one_item_an_example() -> None:
    items = [torch.randn(n, 3) for n in (2, 5, 3, 4)]
    y, model = torch.randn(4), line()

    def loss_fn(model, batch):
        return squared(model, torch.stack([item.mean(0) for item in batch["items"]]), batch["y"])

    wanted = by_hand(model, loss_fn(model, {"items": items, "y": y}))
    torch.testing.assert_close(scored({"items": items, "y": y}, loss_fn), wanted)


AXES = {
    "time first": (torch.randn(6, 4, 3), torch.randn(4)),
    "another length inside": {"x": torch.randn(4, 3), "deep": {"y": torch.randn(5)}},
    "a list of rows or of items": {"x": torch.randn(2, 3), "pair": [torch.randn(2), torch.randn(2)]},
    "nothing that counts": {"scale": torch.tensor(1.0)},
}


@pytest.mark.parametrize("name", AXES)
def test_batches_whose_axes_disagree_are_refused(name: str) -> None:
    with pytest.raises(ct.errors.DataError, match="first axis|one item or one row"):
        scored(AXES[name], lambda model, batch: model.weight.sum())
