"""Low precision trains; a copy, an edit or a second process changes nothing in silence."""

from __future__ import annotations

import copy
import io
import os
import pickle  # what torch.save and multiprocessing use on an optimizer
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.ranks import WORLD, on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from childtuning import Child, ChildOptimizer, Delta, TaskFree, random_child, select_child
from childtuning.child.select import density_for_mass
from childtuning.errors import ConfigError, ParameterError


def a_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


def loss(net: nn.Module, scale: float = 1.0) -> Tensor:
    dtype = next(net.parameters()).dtype
    return net(scale * torch.linspace(-1, 1, 12, dtype=dtype).view(2, 6)).square().sum()


def children(net: nn.Module) -> dict[str, Child | TaskFree]:
    shapes = {name: p.shape for name, p in net.named_parameters()}
    return {
        "fixed": random_child(net, 0.4, always=["2.*"]),
        "whole": Child.whole(shapes),
        "task-free": TaskFree(0.5),
        "task-free rows": TaskFree(0.5, granularity="row"),
    }


# Master values


@pytest.mark.parametrize("kind", ["fixed", "whole", "task-free", "task-free rows"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inner", [torch.optim.AdamW, torch.optim.SGD])
def test_steps_too_small_for_the_weights_add_up(kind: str, dtype: torch.dtype, inner) -> None:
    """A thousand steps that bf16 alone would round away move the weights as float32's do, to a rounding at the end."""
    ends = []
    for to in (dtype, torch.float32):
        net = a_net(dtype).to(to)
        opt = ChildOptimizer(net.named_parameters(), children(net)[kind], inner, lr=2e-5)
        for _ in range(1000):
            for parameter in net.parameters():
                parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
            opt.step()
        ends.append([parameter.detach().float() for parameter in net.parameters()])
    assert not all(
        torch.equal(a, b.detach()) for a, b in zip(ends[0], a_net(dtype).float().parameters(), strict=True)
    )
    for low, full in zip(*ends, strict=True):
        torch.testing.assert_close(low, full, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_masters_are_saved_by_name_and_resume_bitwise() -> None:
    for kind in children(a_net()):
        ends = []
        for stop in (False, True):
            net = a_net(torch.bfloat16)
            opt = ChildOptimizer(net.named_parameters(), children(net)[kind], torch.optim.AdamW, lr=1e-3)
            for step in range(6):
                if stop and step == 3:
                    saved, weights = copy.deepcopy(opt.state_dict()), copy.deepcopy(net.state_dict())
                    assert all(value.dtype == torch.float32 for value in saved["masters"].values())
                    net = a_net(torch.bfloat16)
                    opt = ChildOptimizer(
                        net.named_parameters(), children(net)[kind], torch.optim.AdamW, lr=1.0
                    )
                    opt.load_state_dict(saved)
                    net.load_state_dict(weights)
                opt.zero_grad()
                loss(net, step + 1).backward()
                opt.step()
            ends.append(net)
        assert all(torch.equal(a, b) for a, b in zip(*(net.parameters() for net in ends), strict=True)), kind


# Clipping


@pytest.mark.parametrize("kind", ["fixed", "whole", "task-free"])
def test_clipping_is_undone_by_no_edit(kind: str) -> None:
    def moved(touch: bool) -> float:
        net = a_net()
        before = copy.deepcopy(net.state_dict())
        opt = ChildOptimizer(
            net.named_parameters(), children(net)[kind], torch.optim.SGD, lr=1.0, rescale=False
        )
        loss(net, 3).backward()
        opt.clip_grad_norm_(0.01)
        if touch:
            for parameter in net.parameters():
                if parameter.grad is not None:
                    parameter.grad.nan_to_num_()
        opt.step()
        return sum(float((p - before[n]).square().sum()) for n, p in net.state_dict().items()) ** 0.5

    assert moved(False) == moved(True) <= 0.01 * (1 + 1e-4)


@pytest.mark.parametrize("release", [False, True])
def test_clipping_between_micro_batches_is_torchs(release: bool) -> None:
    ends = []
    for ours in (True, False):
        net = a_net()
        child = Child.from_masks({n: torch.rand(p.shape) < 2 for n, p in net.named_parameters()})
        child = random_child(net, 0.4) if release else child
        mask = {n: part.mask() for n, part in child.parts.items()}
        opt: torch.optim.Optimizer
        if ours:
            opt = ChildOptimizer(
                net.named_parameters(),
                child,
                torch.optim.SGD,
                lr=0.1,
                rescale=False,
                release_gradients=release,
            )
        else:
            opt = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(3):
            for scale in (1.0, 2.0):
                (scale * loss(net, scale)).backward()
                if isinstance(opt, ChildOptimizer):
                    opt.clip_grad_norm_(1.0)
                else:
                    for name, parameter in net.named_parameters():
                        parameter.grad.mul_(mask[name])  # type: ignore[union-attr]
                    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
        ends.append(net)
    for a, b in zip(*(net.parameters() for net in ends), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["fixed", "task-free"])
def test_a_copy_steps_with_the_clipped_gradient_and_pickles(kind: str) -> None:
    net = a_net()
    opt = ChildOptimizer(net.named_parameters(), children(net)[kind], torch.optim.SGD, lr=0.1)
    loss(net, 3).backward()
    opt.clip_grad_norm_(0.01)
    twin, copied = copy.deepcopy((net, opt))
    pickle.dump(opt, io.BytesIO())
    opt.step()
    copied.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["fixed", "task-free"])
def test_a_pickled_one_goes_on_counting(kind: str) -> None:
    net = a_net()
    opt = ChildOptimizer(net.named_parameters(), children(net)[kind], lr=0.1)
    for step in range(1, 5):
        loss(net, 3).backward()
        opt.step()
        opt.zero_grad()
        assert {float(state["step"]) for state in opt.state_dict()["state"].values()} == {step}
        if step == 2:
            net, opt = pickle.loads(pickle.dumps((net, opt)))


@pytest.mark.parametrize(
    ("inner", "options", "words"),
    [
        (torch.optim.SGD, {"rescale": False}, "was saved with rescale=True, and this optimizer has False"),
        (torch.optim.AdamW, {}, "was saved with inner='SGD', and this optimizer has 'AdamW'"),
    ],
)
def test_a_state_of_other_settings_is_refused(inner: Any, options: dict[str, Any], words: str) -> None:
    net = a_net()
    saved = ChildOptimizer(
        net.named_parameters(), children(net)["fixed"], torch.optim.SGD, lr=0.1
    ).state_dict()
    other = ChildOptimizer(net.named_parameters(), children(net)["fixed"], inner, lr=0.1, **options)
    with pytest.raises(ParameterError, match=words):
        other.load_state_dict(saved)


# What is trained, and what is not


def test_parameters_that_are_unfrozen_later_are_trained_or_refused() -> None:
    net = a_net()
    net[0].requires_grad_(False)
    opt = ChildOptimizer(net.named_parameters(), TaskFree(0.5), torch.optim.SGD, lr=0.1)
    before = net[0].weight.detach().clone()
    loss(net).backward()
    opt.step()
    assert torch.equal(net[0].weight, before)
    net[0].requires_grad_(True)
    loss(net).backward()
    opt.step()
    assert not torch.equal(net[0].weight, before)

    net = a_net()
    child = Child.from_masks({"2.weight": torch.ones(4, 8).bool(), "0.weight": torch.zeros(8, 6).bool()})
    opt = ChildOptimizer(net.named_parameters(), child, torch.optim.SGD, lr=0.1)
    net[0].weight.requires_grad_(True)
    loss(net).backward()
    with pytest.raises(ParameterError, match=r"'0.weight' is outside the child and requires a gradient now"):
        opt.step()


@pytest.mark.parametrize("release", [False, True])
def test_remove_gives_the_flags_back_and_attach_takes_them(release: bool) -> None:
    net = a_net()
    net[0].bias.requires_grad_(False)
    flags = [p.requires_grad for p in net.parameters()]
    child = Child.from_masks({"2.weight": torch.eye(4, 8).bool(), "0.weight": torch.zeros(8, 6).bool()})
    opt = ChildOptimizer(net.named_parameters(), child, release_gradients=release)
    frozen = [p.requires_grad for p in net.parameters()]
    assert frozen == [False, False, True, False]
    opt.remove()
    assert [p.requires_grad for p in net.parameters()] == flags
    with pytest.raises(ParameterError, match=r"attach\(\)"):
        opt.step()
    opt.attach()
    assert [p.requires_grad for p in net.parameters()] == frozen


def test_a_forward_pass_that_writes_into_its_weights_breaks_no_freezing() -> None:
    def net() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(10, 4, max_norm=1.0), nn.Flatten(), nn.Linear(12, 3))

    model = net()
    child = select_child({name: torch.rand(p.shape) for name, p in model.named_parameters()}, 0.3)
    opt = ChildOptimizer(model.named_parameters(), child, lr=0.01)
    model(torch.randint(10, (8, 3))).sum().backward()
    with pytest.raises(
        ParameterError, match=r"entries of '0.weight' outside the child have changed .* \(max_norm\)"
    ):
        opt.step()
    for refused in (
        lambda: random_child(net(), 0.3),
        lambda: Delta.capture(net(), child),
    ):
        with pytest.raises(ParameterError, match="the forward pass writes into '0.weight'"):
            refused()
    model = net()  # trained whole, it is the user's own affair
    opt = ChildOptimizer(model.named_parameters(), random_child(model, 0.3, always=["0.*"]), lr=0.01)
    model(torch.randint(10, (8, 3))).sum().backward()
    opt.step()


def test_layers_that_the_loss_does_not_reach_stay_put_under_drawn_rows() -> None:
    ends = []
    for use in (False, True):
        torch.manual_seed(0)
        net = nn.ModuleDict({"used": nn.Linear(4, 4), "pooler": nn.Linear(4, 2)})
        opt = ChildOptimizer(
            net.named_parameters(),
            TaskFree(0.1, granularity="row"),
            lr=0.1,
            weight_decay=0.5,
            model=net if use else None,
        )
        before = net["pooler"].weight.detach().clone()
        for _ in range(20):
            opt.zero_grad()
            net["used"](torch.ones(2, 4)).square().sum().backward()
            opt.step()
        assert torch.equal(net["pooler"].weight, before)
        ends.append(net["used"].weight.detach())
    torch.testing.assert_close(*ends)


def test_an_optimizer_that_evaluates_the_loss_itself_is_refused() -> None:
    with pytest.raises(ConfigError, match="LBFGS evaluates the loss several times a step"):
        ChildOptimizer(a_net().named_parameters(), TaskFree(0.5), torch.optim.LBFGS)


# Processes


def _refusals(rank: int, folder: Path) -> None:
    def refused(words: str, act) -> None:
        found = ""
        try:
            act()
        except (ParameterError, ConfigError) as fault:
            found = str(fault)
        assert re.search(words, found), (
            words,
            found,
        )  # pytest's own failure does not travel between processes

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    net = a_net()
    child = random_child(net, 0.3)
    refused(
        "different children",
        lambda: ChildOptimizer(net.named_parameters(), random_child(net, 0.3, seed=rank)),
    )
    top = Child.from_masks({"2.weight": torch.ones(4, 8).bool()})
    wrapped = DistributedDataParallel(a_net())
    refused("wrapped already", lambda: ChildOptimizer(wrapped.named_parameters(), top))
    refused("begin with 'module.'", lambda: ChildOptimizer(wrapped.named_parameters(), TaskFree(0.5)))
    free, other = TaskFree(0.5, granularity="row"), a_net()
    refused("not averaged", lambda: ChildOptimizer(other.named_parameters(), free, model=other))
    for own in (child, free):
        apart = a_net()
        alone = ChildOptimizer(apart.named_parameters(), own)
        loss(apart, 1.0 + rank).backward()
        refused("gradients differ at the first step", alone.step)
    own = ChildOptimizer(net.named_parameters(), child, release_gradients=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss(net)).backward()
    refused(
        "GradScaler", lambda: scaler.step(own)
    )  # each process would see the overflow of its own gradient alone
    own.remove()
    before = ChildOptimizer(net.named_parameters(), child)
    sharded = fully_shard(net, mesh=mesh)
    assert isinstance(sharded, nn.Module)
    loss(sharded).backward()
    refused("no trained parameter has a gradient", before.step)
    named = list(sharded.named_parameters())
    refused("is sharded", lambda: density_for_mass(dict(named), 0.9))
    refused("neither preset", lambda: ChildOptimizer(named, child, preset="official"))
    refused("without model", lambda: ChildOptimizer(named, child, release_gradients=True))
    refused(
        "mixes coordinates|single entries",
        lambda: ChildOptimizer(named, TaskFree(0.5), torch.optim.Adafactor),
    )
    two = init_device_mesh("cpu", (1, WORLD))
    odd = nn.Parameter(distribute_tensor(torch.ones(4, 8), two, [Replicate(), Shard(1)]))
    refused("over a mesh", lambda: ChildOptimizer([("w", odd)], TaskFree(0.5)))
    taken = ChildOptimizer(named, child)
    refused("do not shard", lambda: taken.reselect(child))
    pieces = taken.state_dict()
    pieces["child"]["pieces"] = [1 - rank, WORLD]
    refused("childtuning.distributed", lambda: taken.load_state_dict(pieces))
    loss(sharded).backward()
    taken.found_inf = taken.grad_scale = torch.zeros(1)  # as a GradScaler sets them
    refused("GradScaler", taken.step)
    save_file({"done": torch.ones(1)}, folder / f"{rank}.safetensors")


@pytest.mark.slow
def test_what_would_train_nothing_or_something_else_is_refused(tmp_path: Path) -> None:
    on_ranks(_refusals, tmp_path)
    assert all(load_file(tmp_path / f"{rank}.safetensors") for rank in range(WORLD))
    assert "RANK" not in os.environ
