"""Torch's default device is for the user's tensors: nothing that the library makes for itself lies there."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import childtuning as ct
from childtuning.child import Budget, random_child


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """Make ``meta`` the default device: whatever is made there has no values, as on a GPU it has no address here."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def net() -> nn.Module:
    torch.manual_seed(0)
    with torch.device("cpu"):
        return nn.Sequential(
            nn.Embedding(20, 8), nn.Flatten(), nn.Linear(32, 128), nn.LayerNorm(128), nn.Linear(128, 2)
        )


BATCH = (torch.arange(32).view(8, 4) % 20, torch.arange(8) % 2)


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def children(granularity: str) -> dict[str, ct.Child | ct.TaskFree]:
    model = net()
    scores = ct.fisher_information(model, [BATCH], losses)
    coarse = ct.fisher_information(
        model, [BATCH] * 2, losses, scores_dtype=torch.bfloat16, scores_device="cpu"
    )
    costs = ct.training_costs(model, BATCH, losses)
    return {
        "global": ct.select_child(scores, 0.3, granularity=granularity, always=["4.*"]),
        "parameter": ct.select_child(coarse, 0.3, granularity=granularity, scope="parameter"),
        "auto": ct.select_child(scores, "auto", granularity=granularity),
        "budget": ct.select_child(scores, budget=Budget(step=0.6), costs=costs, granularity=granularity),
        "random": random_child(model, 0.3, granularity=granularity),
        "task-free": ct.TaskFree(0.3, granularity=granularity),
    }


def trained(child: ct.Child | ct.TaskFree, inner: type[torch.optim.Optimizer], *, whole: bool) -> nn.Module:
    model = net()
    opt = ct.ChildOptimizer(model.named_parameters(), child, inner, lr=0.01, model=None if whole else model)
    for step in range(3):
        losses(model, BATCH).mean().backward()
        opt.clip_grad_norm_(0.5)
        opt.step()
        opt.zero_grad()
        if step == 1:
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    return model


@pytest.mark.parametrize("granularity", ["element", "row", "column", "block"])
def test_results_do_not_depend_on_it(
    granularity: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    runs = []
    for _ in range(2):
        found = children(granularity)
        models = {
            (name, inner.__name__, whole): trained(child, inner, whole=whole)
            for name, child in found.items()
            for inner in (torch.optim.AdamW, torch.optim.SGD)
            for whole in (True, False)
        }
        for name, child in found.items():
            if isinstance(child, ct.Child):
                made = ct.Delta.capture(models[name, "SGD", True], child, base="net")
                made.save(tmp_path / f"{len(runs)}-{name}")
                base = net()
                ct.Delta.load(tmp_path / f"{len(runs)}-{name}").apply_(base)
                models[name, "applied", True] = base
        runs.append(models)
        if len(runs) == 1:
            request.getfixturevalue("elsewhere")
    here, there = runs
    for key, model in here.items():
        for (name, one), other in zip(model.named_parameters(), there[key].parameters(), strict=True):
            assert torch.equal(one, other), (key, name)
