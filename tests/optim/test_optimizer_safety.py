"""What the kernels must never be handed, and who else may hold a model while an optimizer trains it."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, RMSprop, Rprop
from torch.utils._pytree import tree_map

from childtuning import Child, ChildOptimizer, TaskFree, fast, random_child
from childtuning.child import Part
from childtuning.errors import ConfigError, ParameterError
from childtuning.fast import library


def a_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def loss(net: nn.Module) -> Tensor:
    return net(torch.linspace(-1, 1, 12).view(2, 6)).square().sum()


def values(net: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in net.parameters()]


def every_other(net: nn.Module) -> Child:
    return Child.from_masks(
        {n: (torch.arange(p.numel()) % 2 == 0).view(p.shape) for n, p in net.named_parameters()}
    )


# What kernels read by address


@pytest.mark.parametrize("granularity", ["element", "row", "fixed"])
@pytest.mark.parametrize("inner", [AdamW, SGD])
def test_a_state_fits_parameters_in_another_order(granularity: str, inner) -> None:
    """The values are those of a resume in the same order: a state is kept by name."""
    ends = []
    for order in (1, -1):
        net = a_net()
        child = every_other(net) if granularity == "fixed" else TaskFree(0.5, granularity=granularity)
        options = {"momentum": 0.9} if inner is SGD else {}
        opt = ChildOptimizer(net.named_parameters(), child, inner, lr=0.01, **options)
        for _ in range(3):
            loss(net).backward()
            opt.step()
            opt.zero_grad()
        named = list(net.named_parameters())[::order]
        groups = [{"params": named[:1]}, {"params": named[1:]}][::order]
        groups = groups if order == -1 else [{"params": named}]
        saved = opt.state_dict()
        if order == -1:  # other groups as well
            saved["param_groups"] = [{**saved["param_groups"][0], "params": [n]} for n, _ in named]
        other = ChildOptimizer(groups, child, inner, lr=0.01, **options)
        other.load_state_dict(saved)
        loss(net).backward()
        other.step()
        ends.append(values(net))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_state_of_other_parameters_is_refused() -> None:
    net, child = a_net(), TaskFree(0.5)
    saved = ChildOptimizer(net.named_parameters(), child).state_dict()
    other = ChildOptimizer(list(net.named_parameters())[1:], child)
    with pytest.raises(ParameterError, match=r"differ in '0.weight'"):
        other.load_state_dict(saved)


def test_moments_in_another_layout_than_the_weights_are_not_misread() -> None:
    ends = []
    for to in (torch.channels_last, torch.contiguous_format):
        torch.manual_seed(0)
        net = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        opt = ChildOptimizer(net.named_parameters(), TaskFree(0.5), lr=0.1)
        for step in range(3):
            opt.zero_grad()
            net(torch.linspace(-1, 1, 75).view(1, 3, 5, 5) + step).square().sum().backward()
            opt.step()
            net.to(memory_format=to)  # type: ignore[call-overload]
        ends.append(net.weight.detach().contiguous())
    torch.testing.assert_close(*ends)


def _swapped(conv: nn.Module) -> nn.Module:
    conv.weight.data = conv.weight.data.transpose(0, 3).contiguous().transpose(0, 3)
    return conv


@pytest.mark.parametrize(
    "lay_out", [nn.Module.float, lambda conv: conv.to(memory_format=torch.channels_last), _swapped]
)
@pytest.mark.parametrize("granularity", ["element", "row", "column"])
@pytest.mark.parametrize("kind", ["task-free", "fixed", "whole", "carried over", "loaded", "bf16"])
def test_fused_steps_are_those_of_any_layout(lay_out: Any, granularity: str, kind: str) -> None:
    """Torch's fused optimizers walk weights, gradients and moments in the order of memory, whatever their strides."""
    ends = []
    for fused in (True, False):
        torch.manual_seed(0)
        net = lay_out(nn.Conv2d(3, 4, 2))
        if kind == "bf16":
            net = net.bfloat16()
        child = (
            random_child(
                net, 1.0 if kind in ("whole", "carried over", "loaded") else 0.5, granularity=granularity
            )
            if kind not in ("task-free", "bf16")
            else TaskFree(0.5, granularity=granularity)
        )
        opt = ChildOptimizer(net.named_parameters(), child, AdamW, lr=0.01, fused=fused)
        for step in range(4):
            batch = torch.linspace(-1, 1, 75, dtype=net.weight.dtype).view(1, 3, 5, 5) + step
            net(batch).square().sum().backward()
            opt.step()
            opt.zero_grad()
            if kind == "carried over" and step == 1:
                opt.reselect(child)
            if kind == "loaded" and step == 1:
                flat = lambda v: v.contiguous() if isinstance(v, Tensor) else v  # noqa: E731
                opt.load_state_dict(tree_map(flat, opt.state_dict()))
        ends.append(net.weight.detach().float())
    torch.testing.assert_close(*ends, rtol=0, atol=1e-2 if kind == "bf16" else 1e-6)


def test_moments_of_another_dtype_are_not_misread() -> None:
    net = a_net().double()
    opt = ChildOptimizer(net.named_parameters(), TaskFree(0.5))
    net(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
    opt.step()
    net.float()
    opt.zero_grad()
    loss(net).backward()
    with pytest.raises(ParameterError, match="was cast from torch.float64 to torch.float32"):
        opt.step()


def test_a_resized_parameter_is_refused() -> None:
    net = a_net()
    opt = ChildOptimizer(net.named_parameters(), every_other(net))
    net[0].weight.data = torch.zeros(2, 2)
    net[0].weight.grad = torch.ones(2, 2)
    with pytest.raises(ParameterError, match=r"\[8, 6\] became \[2, 2\]"):
        opt.step()


@pytest.mark.parametrize("child", [TaskFree(0.5), None])
def test_an_update_that_kernels_do_not_know_is_not_turned_on_later(child: TaskFree | None) -> None:
    net = a_net()
    opt = ChildOptimizer(net.named_parameters(), child or every_other(net))
    opt.param_groups[0]["amsgrad"] = True
    loss(net).backward()
    with pytest.raises(ParameterError, match="amsgrad=True when you build it"):
        opt.step()


@pytest.mark.parametrize("inner", [SGD, AdamW])
def test_a_masked_nan_changes_nothing(inner, monkeypatch) -> None:
    for switch in ("1", "0"):
        monkeypatch.setenv("CHILDTUNING_FAST", switch)
        weight, child = nn.Parameter(torch.ones(64)), TaskFree(0.5)
        opt = ChildOptimizer([("weight", weight)], child, inner, lr=0.1)
        weight.grad = torch.full((64,), float("nan"))
        opt.step()
        assert torch.equal(weight.isnan(), child.mask("weight", (64,), 0))


# Copies


@pytest.mark.skipif(library.LIBRARY is None or not fast.enabled(), reason="only kernels read addresses")
def test_a_copy_reads_its_own_indices() -> None:
    net = a_net()
    opt = ChildOptimizer(net.named_parameters(), every_other(net))
    loss(net).backward()
    opt.step()
    copied = copy.deepcopy(opt)
    for there, table in copied._one_pass._tables.values():
        read = [(task["index"], task["count"]) for task in table._tasks]
        assert read == [(t.runs.starts.data_ptr(), len(t.runs)) for t in there]
    assert copied._one_pass._tables


def test_a_copy_under_a_schedule_trains_the_copy() -> None:
    net = a_net()
    opt = ChildOptimizer(net.named_parameters(), every_other(net), SGD, lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0)
    twin, copied = copy.deepcopy((net, opt))
    before = values(net)
    loss(twin).backward()
    copied.step()
    assert all(torch.equal(a, b) for a, b in zip(before, values(net), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, values(twin), strict=True))


@pytest.mark.parametrize("child", [TaskFree(0.5), TaskFree(0.5, granularity="row"), None])
def test_autograd_hears_of_an_update(child: TaskFree | None) -> None:
    net = a_net()
    opt = ChildOptimizer(net.named_parameters(), child or every_other(net))
    first = loss(net)
    first.backward(retain_graph=True)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.backward()


# Gradients that are taken over


def released(net: nn.Module, **options) -> ChildOptimizer:
    return ChildOptimizer(
        net.named_parameters(), every_other(net), SGD, lr=0.1, release_gradients=True, **options
    )


def test_a_gradient_older_than_the_optimizer_is_forgotten_with_the_others() -> None:
    fresh, stale = a_net(), a_net()
    loss(stale).mul(100).backward()
    for net in (fresh, stale):
        opt = released(net)
        opt.zero_grad()
        loss(net).backward()
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), stale.parameters(), strict=True))


def test_a_gradient_put_there_by_hand_counts() -> None:
    by_hand, by_pass = a_net(), a_net()
    opt, twin = released(by_hand), released(by_pass)
    gradients = torch.autograd.grad(loss(by_hand), list(by_hand.parameters()))
    for parameter, gradient in zip(by_hand.parameters(), gradients, strict=True):
        parameter.grad = gradient
    loss(by_pass).backward()
    opt.step()
    twin.step()
    assert all(torch.equal(a, b) for a, b in zip(by_hand.parameters(), by_pass.parameters(), strict=True))


def test_two_optimizers_do_not_take_the_same_gradients() -> None:
    net = a_net()
    first = released(net)
    with pytest.raises(ParameterError, match="another optimizer takes"):
        released(net)
    del first
    gc.collect()
    before, opt = values(net), released(net)
    loss(net).backward()
    opt.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, values(net), strict=True))


def test_attaching_again_keeps_gradients() -> None:
    net = a_net()
    opt = ChildOptimizer(net.named_parameters(), TaskFree(0.5, granularity="row"), SGD, lr=0.1, model=net)
    before = values(net)
    loss(net).backward()
    opt.attach()
    opt.step()
    assert not torch.equal(before[0], values(net)[0])


def test_a_grad_scaler_is_refused_where_it_does_not_see_the_gradients() -> None:
    net = a_net()
    opt = ChildOptimizer(net.named_parameters(), TaskFree(0.5, granularity="row"), model=net)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss(net)).backward()
    with pytest.raises(ConfigError, match="GradScaler"):
        scaler.step(opt)
    opt.zero_grad()
    loss(net).backward()
    opt.step()


# Parameters that the loss does not reach


@pytest.mark.parametrize(
    ("inner", "options"), [(SGD, {"momentum": 0.9}), (RMSprop, {"momentum": 0.9}), (Rprop, {})]
)
def test_decay_does_not_enter_the_state_of_a_parameter_before_its_first_gradient(inner, options) -> None:
    if inner is not Rprop:
        options = {**options, "weight_decay": 0.1}
    start = torch.linspace(1, 2, 6)
    early, late, alone = (nn.Parameter(start.clone()) for _ in range(3))
    part = Part((6,), torch.tensor([0, 2, 3]))
    opt = ChildOptimizer(
        [("early", early), ("late", late)],
        Child({"early": part, "late": part}),
        inner,
        lr=0.1,
        rescale=False,
        **options,
    )
    twin = inner([alone], lr=0.1, **options)
    for step in range(4):
        early.grad = torch.ones(6)
        late.grad = alone.grad = None if step == 0 else torch.ones(6) * step
        opt.step()
        twin.step()
    torch.testing.assert_close(late[part.mask()], alone[part.mask()])


def test_what_an_optimizer_keeps_of_a_parameter_before_its_first_gradient_is_its_value() -> None:
    class FromStart(SGD):
        """Keeps the values that it saw first."""

        def step(self, closure=None):
            for parameter in self.param_groups[0]["params"]:
                if parameter.grad is not None:
                    self.state[parameter].setdefault("start", parameter.detach().clone())
            return super().step(closure)

    early, late = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6))
    part = Part((6,), torch.tensor([0, 2, 3]))
    opt = ChildOptimizer(
        [("early", early), ("late", late)], Child({"early": part, "late": part}), FromStart, lr=0.1
    )
    early.grad = torch.ones(6)
    opt.step()
    opt.step()
    late.grad = torch.ones(6)
    opt.step()
    assert [state["start"].tolist() for state in opt.state.values()] == [[1.0] * 3] * 2


def test_a_random_child_survives_its_optimizer_s_copy() -> None:
    net = a_net()
    child = random_child(net, 0.4)
    twin, copied = copy.deepcopy((net, ChildOptimizer(net.named_parameters(), child, lr=0.1)))
    opt = ChildOptimizer(net.named_parameters(), child, lr=0.1)
    for model, optimizer in ((net, opt), (twin, copied)):
        loss(model).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))
