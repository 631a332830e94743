"""Optimizers that pull towards the start: anchored ones and RecAdam."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from childtuning import Child, ChildOptimizer
from childtuning.errors import ConfigError
from childtuning.fast.adamw import supports
from childtuning.methods.l2_sp import anchored
from childtuning.methods.recadam import RecAdam


def test_an_anchored_optimizer_is_never_taken_for_the_plain_one() -> None:
    assert supports(torch.optim.AdamW, {}) and not supports(anchored(torch.optim.AdamW), {"anchor": 0.1})
    assert not supports(RecAdam, {})
    assert anchored(torch.optim.AdamW) is anchored(torch.optim.AdamW)
    assert issubclass(anchored(torch.optim.AdamW), torch.optim.AdamW)


INNERS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.SGD, {}),
    (torch.optim.AdamW, {"fused": True}),
    (torch.optim.Adam, {"foreach": True}),
    (torch.optim.Adagrad, {}),
    (torch.optim.NAdam, {}),
    (torch.optim.RMSprop, {"centered": True}),
    (torch.optim.Rprop, {}),
]


@pytest.mark.parametrize(("inner", "options"), INNERS, ids=lambda value: getattr(value, "__name__", ""))
def test_any_inner_optimizer_can_be_anchored(inner: Any, options: dict[str, Any]) -> None:
    """The pull by hand in front of the plain optimizer is the anchored one."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, generator=generator, dtype=torch.float64)
    by_hand, ours, free = (nn.Parameter(start.clone()) for _ in range(3))
    plain = inner([by_hand], lr=0.01, **options)
    groups = [{"params": [ours]}, {"params": [free], "anchor": 0.0}]
    pulling = anchored(inner)(groups, lr=0.01, anchor=8.0, **options)
    for _ in range(10):
        gradient = torch.randn(6, generator=generator, dtype=torch.float64)
        by_hand.grad, ours.grad, free.grad = gradient, gradient.clone(), gradient.clone()
        with torch.no_grad():
            by_hand -= 0.01 * 8.0 * (by_hand - start)
        plain.step()
        pulling.step()
        torch.testing.assert_close(ours, by_hand, rtol=1e-12, atol=1e-14)
    assert torch.equal(pulling.state[ours]["start"], start) and "start" not in pulling.state[free]
    assert not torch.allclose(free, by_hand, atol=1e-4)


def test_an_anchored_optimizer_that_mixes_coordinates_is_refused() -> None:
    net = nn.Linear(6, 6)
    child = Child.from_masks({"weight": torch.eye(6).bool()})
    for lr in (0.01, 0.0):
        with pytest.raises(ConfigError, match="AnchoredMuon (mixes|cannot)"):
            ChildOptimizer(net.named_parameters(), child, anchored(torch.optim.Muon), lr=lr, anchor=0.1)
    with pytest.raises(ConfigError, match="no option 'anker'"):
        ChildOptimizer(net.named_parameters(), child, anchored(torch.optim.AdamW), anker=0.1)


@pytest.mark.parametrize("make", [anchored(torch.optim.SGD), RecAdam], ids=lambda make: make.__name__)
def test_a_pull_goes_to_the_start_and_no_further(make: Any) -> None:
    w = nn.Parameter(torch.tensor([1.0]))
    options = {"weight": 1e4, "t0": 1000, "k": 1.0} if make is RecAdam else {"anchor": 1e4}
    opt = make([w], lr=1e-2, **options)
    for _ in range(3):
        w.grad = torch.zeros(1)
        opt.step()
        with torch.no_grad():
            w += 0.5
    w.grad = torch.zeros(1)
    opt.step()
    assert w.item() == 1.0


def test_recadam_on_heads_is_adamw_bitwise() -> None:
    start = torch.randn(40, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    first = RecAdam([{"params": [ours], "anchored": False}], lr=1e-2, weight_decay=0.1)
    second = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1, foreach=False)
    for step in range(20):
        for parameter, opt in ((ours, first), (theirs, second)):
            parameter.grad = torch.sin(parameter.detach() * (step + 1))
            opt.step()
    assert torch.equal(ours, theirs) and "start" not in first.state[ours]


@pytest.mark.parametrize("make", [anchored(torch.optim.AdamW), RecAdam], ids=lambda make: make.__name__)
def test_the_start_is_known_where_the_first_gradient_comes_late(make: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    named = {name: nn.Parameter(torch.randn(4, 4, generator=generator)) for name in ("a", "b")}
    mask = torch.rand(4, 4, generator=generator) < 0.5
    start = {name: p.detach()[mask] for name, p in named.items()}
    child = Child.from_masks({"a": mask, "b": mask})
    options = {"anchor": 2.0} if make is not RecAdam else {"weight": 10.0, "t0": 3, "k": 1.0}
    opt = ChildOptimizer(named.items(), child, make, lr=0.01, **options)
    for step in range(3):
        named["a"].grad = torch.ones(4, 4)
        named["b"].grad = torch.ones(4, 4) if step else None
        opt.step()
        kept = {name: state["start"] for name, state in opt.state_dict()["state"].items()}
        assert list(kept) == (["a", "b"] if step else ["a"])
        assert all(torch.equal(kept[name], start[name]) for name in kept)
        assert torch.equal(named["b"].detach()[mask], start["b"]) == (step == 0)
