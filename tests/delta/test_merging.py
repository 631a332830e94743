"""Deltas of several tasks as one: disjoint children exactly, others by mean and TIES, as their definitions say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from childtuning import Child, Delta, merge_deltas, random_child
from childtuning.errors import BaseMismatchError, ConfigError, DeltaError, ParameterError


def net(classes: int = 2) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.body = nn.Linear(20, 10)
    torch.manual_seed(classes)
    model.head = nn.Linear(10, classes)
    return model


def moved(model: nn.Module, child: Child, seed: int) -> Delta:
    draw = torch.Generator().manual_seed(seed)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    with torch.no_grad():
        for (_, p), part in zip(model.named_parameters(), child.resolve(shapes).values(), strict=True):
            p.view(-1)[part.indices()] += torch.randn(part.num_trained, generator=draw)
    return Delta.capture(model, child, base="the base")


def deltas(*, disjoint: bool) -> list[Delta]:
    found = []
    first = random_child(net(), 0.3, eligible=("body.*",), always=("head.*",))
    everything = Child.whole({n: p.shape for n, p in net().named_parameters() if n.startswith("body")})
    second = everything - first
    second = Child(second.parts, always=("head.*",))
    for classes, child in ((2, first), (3, second if disjoint else random_child(
            net(), 0.3, seed=1, eligible=("body.*",), always=("head.*",)))):  # fmt: skip
        found.append(moved(net(classes), child, classes))
    return found


def test_disjoint_children_add_exactly() -> None:
    tasks = deltas(disjoint=True)
    merged = merge_deltas(tasks, own=("head.*",), base=net())
    for task, delta, classes in zip(tasks, merged, (2, 3), strict=True):
        model, alone = net(classes), net(classes)
        delta.apply_(model)
        task.apply_(alone)
        own = task.parts["body.weight"].indices()
        assert torch.equal(model.body.weight.view(-1)[own], alone.body.weight.view(-1)[own])
        assert torch.equal(model.head.weight, alone.head.weight)
        for other in tasks:
            place = other.parts["body.weight"].indices()
            assert torch.equal(model.body.weight.view(-1)[place], other.values["body.weight"].view(-1))
    other = net()
    with torch.no_grad():
        other.body.bias += 1
    with pytest.raises(BaseMismatchError):
        merge_deltas(tasks, own=("head.*",), base=other)
    merged_base = net()
    merged_base.body.weight.data += 1e-3  # as where a LoRA was merged in: other parameters are the same
    tasks[1] = moved(merged_base, Child(tasks[1].parts, always=("head.*",)), 3)
    with pytest.raises(BaseMismatchError):
        merge_deltas(tasks, own=("head.*",), base=net())


def test_entries_of_two_values_are_refused() -> None:
    tasks = deltas(disjoint=False)
    with pytest.raises(DeltaError, match="different values for entries of 'body"):
        merge_deltas(tasks, own=("head.*",), base=net())
    with pytest.raises(DeltaError, match=r"'head.* differs.*own="):
        merge_deltas(deltas(disjoint=True), base=net())
    same = [tasks[0], tasks[0]]
    assert torch.equal(
        merge_deltas(same, base=net())[0].values["body.weight"], tasks[0].values["body.weight"]
    )


def test_mean_and_ties_are_their_definitions() -> None:
    tasks = deltas(disjoint=False)
    base = net()
    changes = []
    for task, classes in zip(tasks, (2, 3), strict=True):
        model = net(classes)
        task.apply_(model)
        changes.append(
            torch.cat([(model.body.weight - base.body.weight).view(-1), model.body.bias - base.body.bias])
        )
    stacked = torch.stack(changes).detach()
    mean = merge_deltas(tasks, "mean", base=base, own=("head.*",), weight=2.0)[0]
    trimmed = []
    for change, task in zip(stacked, tasks, strict=True):
        trained = sum(task.parts[f"body.{n}"].num_trained for n in ("weight", "bias"))
        least = change.abs().sort(descending=True).values[round(0.5 * trained) - 1]
        trimmed.append(change * (change.abs() >= least))
    kept = torch.stack(trimmed)
    sign = kept.sum(0).sign()
    agrees = (kept.sign() == sign) & (kept != 0)
    elected = (kept * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    ties = merge_deltas(tasks, "ties", base=base, own=("head.*",), kept=0.5)[0]
    for delta, wanted in ((mean, 2.0 * stacked.mean(0)), (ties, elected)):
        model = net()
        delta.apply_(model)
        found = torch.cat([(model.body.weight - base.body.weight).view(-1), model.body.bias - base.body.bias])
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"base": None}, "Pass base="),
        ({"how": "tie"}, "Did you mean 'ties'"),
        ({"kept": 0}, "kept must lie"),
        ({"weight": 2.0}, "Leave it out"),
    ],
)
def test_bad_arguments_are_named(options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        merge_deltas(deltas(disjoint=True), **{"base": net(), **options})
    with pytest.raises(ConfigError, match="no deltas"):
        merge_deltas([])
    with pytest.raises(ParameterError, match="matched no parameter"):
        merge_deltas(deltas(disjoint=True), own=("haed.*",), base=net())


def test_float64_is_not_rounded_on_the_way() -> None:
    base = net().double()
    child = random_child(base, 0.5)
    same = [Delta.capture(base, child), Delta.capture(base, child)]
    for how in ("mean", "ties"):
        merged = merge_deltas(same, how, base=base)[0]
        for name, value in merged.values.items():
            assert torch.equal(value, same[0].values[name]), (how, name)
