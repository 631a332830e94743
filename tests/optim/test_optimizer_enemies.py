"""What once went wrong without a word: each of these was a fault."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from childtuning import Child, ChildOptimizer, TaskFree, fast, random_child
from childtuning.child import Part
from childtuning.errors import ConfigError, ParameterError
from childtuning.methods.l2_sp import anchored
from childtuning.methods.recadam import RecAdam


def a_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


def loss(net: nn.Module, scale: float = 1.0) -> Tensor:
    dtype = next(net.parameters()).dtype
    return net(scale * torch.linspace(-1, 1, 12, dtype=dtype).view(2, 6)).square().sum()


def rows_of(net: nn.Module) -> Child:
    return random_child(net, 0.5, granularity="row", always=["2.*"])


@pytest.mark.parametrize("kind", ["fixed", "task-free"])
def test_weights_that_are_frozen_stay_put_with_model(kind: str) -> None:
    net = a_net()
    child = rows_of(net) if kind == "fixed" else TaskFree(0.5, granularity="row")
    if kind == "task-free":
        net[0].weight.requires_grad_(False)
    opt = ChildOptimizer(net.named_parameters(), child, lr=0.1, model=net)
    net[0].weight.requires_grad_(False)
    before = net[0].weight.detach().clone()
    for _ in range(3):
        opt.zero_grad()
        loss(net).backward()
        opt.step()
    assert torch.equal(net[0].weight, before) and not torch.equal(net[2].weight, a_net()[2].weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("child", [TaskFree(0.5), None])
def test_parameters_without_axes(dtype: torch.dtype, child: TaskFree | None) -> None:
    scale, weight = nn.Parameter(torch.tensor(2.0, dtype=dtype)), nn.Parameter(torch.ones(3, dtype=dtype))
    whole = Child.whole({"scale": (), "weight": (3,)})
    opt = ChildOptimizer([("scale", scale), ("weight", weight)], child or whole, torch.optim.SGD, lr=0.5)
    for _ in range(4):
        scale.grad, weight.grad = torch.ones_like(scale), torch.ones_like(weight)
        opt.step()
    assert float(scale.detach()) < 2.0


@pytest.mark.skipif(not fast.enabled(), reason="is about layers of the fast room")
def test_a_model_whose_optimizer_is_deleted_has_its_own_layers_back() -> None:
    net = a_net()
    for child in (rows_of(net), TaskFree(0.5, granularity="row")):
        opt = ChildOptimizer(net.named_parameters(), child, model=net)
        assert opt.structured or type(net[0]) is not nn.Linear
        del opt
        gc.collect()
        assert type(net[0]) is nn.Linear and "leaf" not in vars(net[0])
        for parameter in net.parameters():
            parameter.requires_grad_(True)
        loss(net).backward()
        assert net[0].weight.grad is not None


@pytest.mark.parametrize(
    ("inner", "options"),
    [
        (anchored(torch.optim.SGD), {"lr": 0.1, "anchor": 1.0}),
        (RecAdam, {"lr": 1e-3, "t0": 5, "weight": 100.0}),
        (torch.optim.Rprop, {"lr": 0.01}),
        (torch.optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 1.0}),
        (torch.optim.ASGD, {"lr": 0.01}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_entries_that_join_start_as_the_inner_optimizers_own_do(inner: Any, options: dict[str, Any]) -> None:
    """They move as under an optimizer that begins with them."""
    weight, fresh = (nn.Parameter(torch.linspace(1, 2, 8)) for _ in range(2))
    early, late = Part((8,), torch.tensor([0, 1])), Part((8,), torch.tensor([0, 1, 4, 5]))
    opt = ChildOptimizer([("w", weight)], Child({"w": early}), inner, rescale=False, **options)
    for _ in range(3):
        weight.grad = torch.full((8,), 1e-3)
        opt.step()
    opt.reselect(Child({"w": late}))
    twin = inner([fresh], **options)
    for step in range(6):
        for parameter, optimizer in ((weight, opt), (fresh, twin)):
            parameter.grad = torch.full((8,), 1e-3 * (step + 1))
            optimizer.step()
    rtol = 5e-3 if inner is RecAdam else 1e-4  # its step fades in by the count that goes on
    torch.testing.assert_close(weight.detach()[[4, 5]], fresh.detach()[[4, 5]], rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("inner", [torch.optim.AdamW, torch.optim.NAdam])
def test_entries_that_join_with_a_second_moment_move_as_those_that_were_there(inner: Any) -> None:
    weight = nn.Parameter(torch.zeros(8))
    early, late = Part((8,), torch.tensor([0, 1])), Part((8,), torch.tensor([0, 1, 4, 5]))
    opt = ChildOptimizer([("w", weight)], Child({"w": early}), inner, rescale=False, lr=1e-3)
    for step in range(80):
        if step == 20:
            opt.reselect(Child({"w": late}), {"w": torch.full((8,), 4.0)})
        before = weight.detach().clone()
        weight.grad = torch.full((8,), 2.0)
        opt.step()
    moved = (weight.detach() - before)[[0, 4]]
    torch.testing.assert_close(moved[1], moved[0], rtol=0.01, atol=0)  # the first moment has caught up


@pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("granularity", ["element", "row"])
def test_a_step_leaves_gradients_as_they_were(inner: Any, granularity: str) -> None:
    net = a_net()
    opt = ChildOptimizer(net.named_parameters(), TaskFree(0.5, granularity=granularity), inner, lr=0.1)
    loss(net).backward()
    before = [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]
    opt.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), before, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("write", ["swap", "permute", "scale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_writes_that_keep_the_sum_of_the_bits_are_noticed(write: str, dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(dtype))
    mask = torch.zeros(6, 5, dtype=torch.bool)
    mask[0] = True
    opt = ChildOptimizer([("w", weight)], Child.from_masks({"w": mask}), torch.optim.SGD, lr=0.1)
    with torch.no_grad():
        if write == "swap":
            weight[[1, 2]] = weight[[2, 1]].clone()
        elif write == "permute":
            weight[3] = weight[3].flip(0)
        else:
            weight[4] *= 2
            weight[5] /= 2
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ParameterError, match="outside the child have changed"):
        opt.step()


def test_a_state_that_is_loaded_leaves_no_master_values_behind() -> None:
    net = a_net(torch.bfloat16)
    child = random_child(net, 0.5, always=["2.*"])
    opt = ChildOptimizer(net.named_parameters(), child, lr=1e-4)
    start, fresh = copy.deepcopy(net.state_dict()), copy.deepcopy(opt.state_dict())
    ends = []
    for _ in range(2):
        for step in range(50):
            opt.zero_grad()
            loss(net, step % 3 + 1).backward()
            opt.step()
        ends.append([parameter.detach().clone() for parameter in net.parameters()])
        net.load_state_dict(start)
        opt.load_state_dict(fresh)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_state_resumed_on_other_weights_is_refused() -> None:
    net = a_net()
    child = random_child(net, 0.5)
    opt = ChildOptimizer(net.named_parameters(), child)
    loss(net).backward()
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    other = a_net()
    with torch.no_grad():
        other[0].weight += 1
    resumed = ChildOptimizer(other.named_parameters(), child)
    resumed.load_state_dict(saved)
    loss(other).backward()
    with pytest.raises(ParameterError, match="outside the child have changed"):
        resumed.step()


def test_options_of_other_groups_are_refused_and_none_is_shared() -> None:
    net = a_net()
    named = list(net.named_parameters())
    lr = torch.tensor(1e-2)
    groups = [{"params": named[:2], "lr": lr}, {"params": named[2:], "lr": torch.tensor(1e-4)}]
    opt = ChildOptimizer(groups, TaskFree(0.5), torch.optim.SGD, lr=0.1)
    saved = opt.state_dict()
    again = ChildOptimizer(groups, TaskFree(0.5), torch.optim.SGD, lr=0.1)
    again.load_state_dict(saved)
    again.param_groups[0]["lr"].fill_(5.0)
    assert float(opt.param_groups[0]["lr"]) == pytest.approx(1e-2)
    with pytest.raises(ParameterError, match="saved with different options"):
        ChildOptimizer(named, TaskFree(0.5), torch.optim.SGD, lr=0.1).load_state_dict(saved)


def test_a_norm_where_no_row_was_drawn() -> None:
    for seed in range(20):
        net = a_net()
        opt = ChildOptimizer(net.named_parameters(), TaskFree(0.05, seed=seed, granularity="row"), model=net)
        loss(net).backward()
        assert bool(opt.clip_grad_norm_(1.0, float("inf")).isfinite())


def test_what_cannot_be_trained_is_refused_in_one_line() -> None:
    count = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    weight = nn.Parameter(torch.ones(3))
    child = Child.from_masks({"w": torch.tensor([True, False, True])}, always=["count"])
    with pytest.raises(ParameterError, match="only floating-point parameters are trained"):
        ChildOptimizer([("w", weight), ("count", count)], child)
    net = a_net()
    for words, act in {
        "child must be a Child": lambda: ChildOptimizer(net.named_parameters(), None),  # type: ignore[arg-type]
        "got a model in place": lambda: ChildOptimizer(net, TaskFree(0.5)),  # type: ignore[arg-type]
        "has no 'params'": lambda: ChildOptimizer([{"lr": 1.0}], TaskFree(0.5)),
        "does not take these options": lambda: ChildOptimizer(net.named_parameters(), TaskFree(0.5), betta=1),
    }.items():
        with pytest.raises((ConfigError, ParameterError), match=words):
            act()


def test_a_reselection_that_fails_changes_nothing() -> None:
    net = a_net()
    opt = ChildOptimizer(net.named_parameters(), random_child(net, 0.3), lr=0.1)
    loss(net).backward()
    opt.step()
    with pytest.raises(ParameterError, match="which no parameter has"):
        opt.reselect(random_child(net, 0.3, seed=2), {"0.weight": torch.ones(3)})
    with pytest.raises(ConfigError, match="Pass a Child"):
        opt.reselect(TaskFree(0.5))  # type: ignore[arg-type]
    whole = ChildOptimizer(
        (twin := a_net()).named_parameters(),
        Child.whole({n: p.shape for n, p in twin.named_parameters()}),
        torch.optim.Adafactor,
    )
    with pytest.raises(ConfigError, match="Adafactor"):
        whole.reselect(random_child(twin, 0.3))
    for model, optimizer in ((net, opt), (twin, whole)):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


def test_hooks_of_state_dicts_run_as_torch_runs_them() -> None:
    net, seen = a_net(), []
    opt = ChildOptimizer(net.named_parameters(), rows_of(net), lr=0.1)
    opt.register_state_dict_pre_hook(lambda optimizer: seen.append("before saving"))
    opt.register_state_dict_post_hook(lambda optimizer, state: {**state, "mine": 1})
    opt.register_load_state_dict_pre_hook(lambda optimizer, state: seen.append(state.pop("mine")))
    opt.register_load_state_dict_post_hook(lambda optimizer: seen.append("loaded"))
    loss(net).backward()
    opt.step()
    state = opt.state_dict()
    opt.load_state_dict(state)
    assert seen == ["before saving", 1, "loaded"] and state["mine"] == 1
    copied = copy.deepcopy(opt)
    copied.load_state_dict(state)
    assert seen[3:] == [1, "loaded"]


def test_two_parameters_in_one_memory_are_refused() -> None:
    net = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6))
    net[1].weight.data = net[0].weight.data  # type: ignore[union-attr]
    with pytest.raises(
        ParameterError, match=r"'0.weight' and '1.weight' are two parameters in the same memory"
    ):
        ChildOptimizer(net.named_parameters(), random_child(net, 0.3))
    buffer = torch.zeros(6, 4)
    parts = {"left": buffer[:, :2], "right": buffer[:, 2:], "more": buffer[:, 1:3]}
    held = {name: nn.Parameter(part) for name, part in parts.items()}
    apart = [(name, held[name]) for name in ("left", "right")]
    ChildOptimizer(apart, Child.whole({name: p.shape for name, p in apart}))
    with pytest.raises(ParameterError, match="same memory"):
        ChildOptimizer(held.items(), Child.whole({name: p.shape for name, p in held.items()}))


def test_a_reselection_sees_frozen_entries_that_have_changed() -> None:
    net = a_net()
    opt = ChildOptimizer(net.named_parameters(), random_child(net, 0.3), lr=0.1)
    loss(net).backward()
    opt.step()
    with torch.no_grad():
        next(net.parameters()).mul_(2)
    with pytest.raises(ParameterError, match="outside the child have changed"):
        opt.reselect(random_child(net, 0.3, seed=2))
    opt.accept_weights()
    opt.reselect(random_child(net, 0.3, seed=2))
