"""Clipping and clearing that miss the gradients which the optimizer has taken are told."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from childtuning import ChildOptimizer, TaskFree, fast, random_child

KINDS = ["released", "nothing left", *(("column", "task-free") if fast.enabled() else ())]
LEFT = [kind for kind in KINDS if kind != "nothing left"]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


def optimizer_of(kind: str, model: nn.Module) -> ChildOptimizer:
    always = ("1.*", "3.*")
    if kind == "task-free":
        free = TaskFree(0.5, granularity="row", always=always)
        return ChildOptimizer(model.named_parameters(), free, torch.optim.SGD, lr=0.1, model=model)
    unit = "element" if kind == "nothing left" else "column"
    child = random_child(
        model, 0.4, granularity=unit, eligible="*", always=() if kind == "nothing left" else always
    )
    how = {"release_gradients": True} if kind in ("released", "nothing left") else {"model": model}
    return ChildOptimizer(model.named_parameters(), child, torch.optim.SGD, lr=0.1, **how)


def backward(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    model(torch.randn(4, 6, generator=generator)).square().mean().backward()


def clip_by_torch(model: nn.Module, opt: ChildOptimizer) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def clip_but_do_nothing(model: nn.Module, opt: ChildOptimizer) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e9)


def clip_values(model: nn.Module, opt: ChildOptimizer) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 0.1)


def clear(model: nn.Module, opt: ChildOptimizer) -> None:
    model.zero_grad()
    backward(model)


def clear_in_place(model: nn.Module, opt: ChildOptimizer) -> None:
    model.zero_grad(set_to_none=False)
    backward(model)


def clear_at_last(model: nn.Module, opt: ChildOptimizer) -> None:
    model.zero_grad()


WRONG = [clip_by_torch, clip_values, clear, clear_in_place, clear_at_last]


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [(wrong, kind) for wrong in WRONG for kind in KINDS] + [(clip_but_do_nothing, "nothing left")],
)
def test_what_misses_taken_gradients_is_told_once(wrong: Callable, kind: str) -> None:
    model = net()
    opt = optimizer_of(kind, model)
    backward(model)
    opt.step()
    opt.zero_grad()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            backward(model)
            wrong(model, opt)
            opt.step()
            opt.zero_grad()
    (warning,) = told
    assert "Call the optimizer's own clip_grad_norm_ and zero_grad" in str(warning.message)
    assert warning.filename == __file__


def clip(model: nn.Module, opt: ChildOptimizer) -> None:
    opt.clip_grad_norm_(0.1)


def clip_and_measure(model: nn.Module, opt: ChildOptimizer) -> None:
    opt.clip_grad_norm_(0.1)
    opt.clip_grad_norm_(float("inf"))


def begin_again(model: nn.Module, opt: ChildOptimizer) -> None:
    opt.zero_grad()
    backward(model)


def accumulate(model: nn.Module, opt: ChildOptimizer) -> None:
    backward(model)
    backward(model)


def change_the_head(model: nn.Module, opt: ChildOptimizer) -> None:
    model[3].weight.grad = None
    model[3].bias.grad.mul_(0.5)


def step_twice(model: nn.Module, opt: ChildOptimizer) -> None:
    opt.step()
    model.zero_grad()
    backward(model)


def detach(model: nn.Module, opt: ChildOptimizer) -> None:
    opt.remove()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    opt.attach()


def measure_by_torch(model: nn.Module, opt: ChildOptimizer) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), float("inf"))


RIGHT = [clip, clip_and_measure, begin_again, accumulate, step_twice, detach]


@pytest.mark.parametrize(
    ("right", "kind"),
    [(right, kind) for right in RIGHT for kind in KINDS]
    + [(right, kind) for right in (change_the_head, clip_but_do_nothing, measure_by_torch) for kind in LEFT],
)
def test_what_is_right_is_not_told(right: Callable, kind: str) -> None:
    model = net()
    opt = optimizer_of(kind, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            backward(model)
            right(model, opt)
            opt.step()
            opt.zero_grad()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "task-free"])
def test_the_shown_tensors_may_be_clipped(kind: str) -> None:
    model, twin = net(), net()
    opts = [optimizer_of(kind, one) for one in (model, twin)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for one, opt in zip((model, twin), opts, strict=True):
            backward(one)
            if one is model:
                nn.utils.clip_grad_norm_([p for group in opt.param_groups for p in group["params"]], 0.1)
            else:
                opt.clip_grad_norm_(0.1)
            opt.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, twin.get_parameter(name))
        assert parameter.grad is None or opt.child.parts.get(name) is None or opt.child.parts[name].is_whole


@pytest.mark.parametrize("scaled", [False, True])
def test_a_scaler_is_not_told_and_torch_clipping_behind_it_is(scaled: bool) -> None:
    model = net()
    opt = optimizer_of("released", model)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaler.scale(model(torch.randn(4, 6)).square().mean()).backward()
        scaler.unscale_(opt)
        opt.clip_grad_norm_(0.1)
        scaler.step(opt)
        scaler.update()
    opt.zero_grad()
    scaler.scale(model(torch.randn(4, 6)).square().mean()).backward()
    scaler.unscale_(opt)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match="missed those"):
        scaler.step(opt)


def test_nothing_is_taken_where_all_is_trained() -> None:
    model = net()
    child = random_child(model, 1.0)
    opt = ChildOptimizer(model.named_parameters(), child, torch.optim.SGD, lr=0.1, release_gradients=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(model)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        opt.step()


def test_a_gradient_is_not_kept_alive() -> None:
    model = net()
    opt = optimizer_of("released", model)
    backward(model)
    assert model[1].weight.grad is not None
    finds = torch.utils.weak.TensorWeakRef(model[1].weight.grad)
    opt.step()
    backward(model)
    model.zero_grad()
    assert finds() is None


def test_a_gradient_that_is_added_to_the_witness_counts() -> None:
    model, twin = net(), net()
    for one in (model, twin):
        opt = optimizer_of("nothing left", one)
        backward(one)
        if one is model:
            one[3].bias.grad.add_(1.0)
        else:
            opt.param_groups[0]["params"][-1].grad.add_(1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt.step()
    assert torch.equal(model[3].bias, twin[3].bias) and model[3].bias.grad is None


def test_a_copy_of_the_model_has_no_notes() -> None:
    model = net()
    opt = optimizer_of("released", model)
    other = copy.deepcopy(model)
    backward(other)
    backward(model)
    nn.utils.clip_grad_norm_(other.parameters(), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()


def test_gradients_of_gradients_are_not_told() -> None:
    model = net()
    opt = optimizer_of("released", model)

    def loss() -> Tensor:
        return model(torch.ones(4, 6)).square().mean()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Using backward")
        for _ in range(2):
            loss().backward(create_graph=True)
        opt.step()


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_after_accumulation_runs(kind: str) -> None:
    model = net()
    opt = optimizer_of(kind, model)
    dense = net()
    backward(dense)
    found: list[Tensor | None] = []
    model[0].weight.register_post_accumulate_grad_hook(
        lambda weight: found.append(None if weight.grad is None else weight.grad.clone())
    )
    backward(model)
    (gradient,) = found
    if kind == "task-free":  # a fixed child's has been taken by then
        torch.testing.assert_close(gradient, dense[0].weight.grad)
    else:
        assert gradient is None
    opt.step()


def test_an_optimizer_that_clips_lets_a_trainer_measure() -> None:
    model = net()
    child = random_child(model, 0.4, eligible="*")
    opt = ChildOptimizer(
        model.named_parameters(), child, torch.optim.SGD, lr=0.1, release_gradients=True, max_grad_norm=1.0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(model)
        measure_by_torch(model, opt)
        opt.step()
