"""ChildOptimizer against its twins, its frozen entries, its state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.reference.masked_steps import masked_adamw, official_steps
from torch import Tensor, nn

from childtuning import Child, ChildOptimizer, TaskFree, fast, select_child
from childtuning.errors import ConfigError, ParameterError
from childtuning.fast.adamw import fits

SHAPES = {"a.weight": (7, 5), "a.bias": (7,), "b.weight": (3, 7), "head.weight": (2, 3)}
ADAMW = {"lr": 3e-3, "weight_decay": 0.1}


def parameters(dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for name, shape in SHAPES.items()
    }


def random_gradients(steps: int, seed: int = 1) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
        for _ in range(steps)
    ]


def a_child(
    density: float = 0.3, granularity: str = "element", always: tuple[str, ...] = ("head.*",)
) -> Child:
    generator = torch.Generator().manual_seed(2)
    scores = {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}
    return select_child(scores, density, granularity=granularity, always=always)


def run(opt: ChildOptimizer, named: dict[str, nn.Parameter], gradients: list[dict[str, Tensor]]) -> None:
    for gradient in gradients:
        for name, parameter in named.items():
            parameter.grad = (
                gradient[name].to(parameter.dtype, copy=True) if parameter.requires_grad else None
            )
        opt.step()


def detached(named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in named.items()}


def full_masks(child: Child) -> dict[str, Tensor]:
    return {name: part.mask() for name, part in child.resolve(SHAPES).items()}


@pytest.mark.parametrize("granularity", ["element", "row", "column", "block", "parameter"])
def test_fixed_child_follows_masked_adamw_for_100_steps(granularity: str) -> None:
    named, gradients, child = parameters(), random_gradients(100), a_child(0.5, granularity)
    before, masks = detached(named), full_masks(child)
    opt = ChildOptimizer(named.items(), child, torch.optim.AdamW, **ADAMW)
    run(opt, named, gradients)
    scaled = [
        {name: g * (child.density if name.startswith("head") else 1.0) for name, g in step.items()}
        for step in gradients
    ]
    twin = masked_adamw(before, scaled, [masks] * 100, density=child.density, frozen=True, **ADAMW)
    for name, parameter in named.items():
        torch.testing.assert_close(parameter.detach(), twin[name], rtol=1e-10, atol=1e-12)
        assert torch.equal(parameter.detach()[~masks[name]], before[name][~masks[name]])


def test_task_free_follows_the_twin_given_its_masks() -> None:
    named, gradients, free = parameters(), random_gradients(100), TaskFree(0.3, seed=5, always=("head.*",))
    before = detached(named)
    masks = [
        {
            name: torch.ones(shape, dtype=torch.bool)
            if name.startswith("head")
            else free.mask(name, shape, step)
            for name, shape in SHAPES.items()
        }
        for step in range(100)
    ]
    run(ChildOptimizer(named.items(), free, torch.optim.AdamW, **ADAMW), named, gradients)
    scaled = [{n: g * (0.3 if n.startswith("head") else 1.0) for n, g in step.items()} for step in gradients]
    twin = masked_adamw(before, scaled, masks, density=0.3, frozen=False, **ADAMW)
    for name, parameter in named.items():
        torch.testing.assert_close(parameter.detach(), twin[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variant", ["task-driven", "task-free"])
def test_official_preset_follows_the_official_code(variant: str) -> None:
    named, gradients = parameters(), random_gradients(50)
    before = detached(named)
    if variant == "task-driven":
        child: Child | TaskFree = a_child(0.3)
        masks, divide_by = [full_masks(child)] * 50, 1.0
    else:
        child, divide_by = TaskFree(0.3, seed=1), 0.3
        masks = [{n: child.mask(n, s, t) for n, s in SHAPES.items()} for t in range(50)]
    run(ChildOptimizer(named.items(), child, preset="official", **ADAMW), named, gradients)
    twin = official_steps(before, gradients, masks, divide_by=divide_by, **ADAMW)
    for name, parameter in named.items():
        torch.testing.assert_close(parameter.detach(), twin[name], rtol=1e-10, atol=1e-12)


INNERS = [
    (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}),
    (torch.optim.RAdam, {"lr": 0.01, "weight_decay": 0.1}),
    (torch.optim.NAdam, {"lr": 0.01, "weight_decay": 0.1}),
    (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    (torch.optim.Adamax, {"lr": 0.01}),
    (torch.optim.Adagrad, {"lr": 0.01}),
    (torch.optim.Adadelta, {"lr": 10.0}),
    (torch.optim.RMSprop, {"lr": 0.01, "centered": True}),
    (torch.optim.Rprop, {"lr": 0.01}),
    (torch.optim.ASGD, {"lr": 0.01}),
]


@pytest.mark.parametrize(("inner", "options"), INNERS, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_is_outside_the_child_is_frozen_bitwise(inner, options, dtype) -> None:
    named, child = parameters(dtype), a_child(0.3)
    before, masks = detached(named), full_masks(child)
    run(ChildOptimizer(named.items(), child, inner, **options), named, random_gradients(50))
    for name, parameter in named.items():
        outside = ~masks[name]
        assert torch.equal(parameter.detach()[outside], before[name][outside])
        if masks[name].any():
            assert (parameter.detach() != before[name])[masks[name]].float().mean() > 0.8


@pytest.mark.parametrize(("inner", "options"), INNERS, ids=lambda value: getattr(value, "__name__", ""))
def test_density_one_is_the_inner_optimizer_bitwise(inner, options) -> None:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    gradients = random_gradients(50)
    opt = ChildOptimizer(ours.items(), a_child(1.0), inner, **options)
    run(opt, ours, gradients)
    run(inner(list(theirs.values()), **options), theirs, gradients)
    for name in SHAPES:
        assert torch.equal(ours[name], theirs[name])
    assert {id(p) for group in opt.inner.param_groups for p in group["params"]} == {
        id(p) for p in ours.values()
    }


class Anchored(torch.optim.SGD):
    """Decay towards the values that the optimizer was built with."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.anchors = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p, anchor in zip(self.param_groups[0]["params"], self.anchors, strict=True):
            p.grad.add_(p.detach() - anchor)
        super().step(closure)


def test_an_optimizer_that_reads_values_when_it_is_built_is_refused() -> None:
    with pytest.raises(ConfigError, match="Anchored reads the parameters when it is built"):
        ChildOptimizer(parameters(torch.float32).items(), a_child(), Anchored, lr=0.1)


@pytest.mark.parametrize(
    "inner", [torch.optim.Muon, torch.optim.LBFGS, torch.optim.Adafactor, torch.optim.SparseAdam]
)
def test_optimizers_that_mix_coordinates_are_refused(inner) -> None:
    named = parameters(torch.float32)
    child = Child.from_masks({"a.weight": torch.eye(7, 5).bool()})
    with pytest.raises(ConfigError, match=rf"{inner.__name__} (mixes|cannot).*AdamW"):
        ChildOptimizer(named.items(), child, inner, lr=0.01)
    assert all(parameter.requires_grad for parameter in named.values())


def test_unknown_option_is_named() -> None:
    with pytest.raises(ConfigError, match="no option 'learning_rate'"):
        ChildOptimizer(parameters().items(), a_child(), torch.optim.AdamW, learning_rate=0.01)


def test_state_is_compact_and_frozen_parameters_need_no_gradient() -> None:
    named = parameters(torch.float32)
    mask = torch.zeros(7, 5, dtype=torch.bool)
    mask[2, 3] = True
    child = Child.from_masks({"a.weight": mask, "a.bias": torch.zeros(7, dtype=torch.bool)})
    opt = ChildOptimizer(named.items(), child, torch.optim.AdamW)
    assert [name for name, p in named.items() if p.requires_grad] == ["a.weight"]
    run(opt, named, random_gradients(2))
    if fast.enabled() and fits(named["a.weight"]):  # two moments and the index; the step count
        assert opt.num_state_bytes == 3 * 4 + 4 + 4  # and one number in place of the values
    others = parameters(torch.float32)
    other = ChildOptimizer(others.items(), child, torch.optim.RAdam)
    run(other, others, random_gradients(2))
    assert other.num_state_bytes == 4 * 4 + 4  # value, two moments, index; the step count
    assert sum(p.numel() for group in opt.inner.param_groups for p in group["params"]) == 1


def test_parameters_without_a_gradient_keep_still() -> None:
    named, child = parameters(), a_child(0.4)
    opt = ChildOptimizer(named.items(), child, torch.optim.AdamW, **ADAMW)
    run(opt, named, random_gradients(3))
    before = detached(named)
    gradients = random_gradients(1, seed=9)[0]
    for name, parameter in named.items():
        parameter.grad = None if name == "a.weight" else gradients[name]
    opt.step()
    assert torch.equal(named["a.weight"], before["a.weight"])
    assert not torch.equal(named["b.weight"], before["b.weight"])
    opt.zero_grad()
    before = detached(named)
    opt.step()
    assert all(torch.equal(named[name], before[name]) for name in SHAPES)


def test_clipping_counts_the_child_only_and_scales_what_the_step_uses() -> None:
    named, child, gradient = parameters(), a_child(0.3), random_gradients(1)[0]
    masks = full_masks(child)
    for name, parameter in named.items():
        parameter.grad = gradient[name].clone()
    before = detached(named)
    opt = ChildOptimizer(named.items(), child, torch.optim.SGD, lr=1.0)
    norm = opt.clip_grad_norm_(0.5)
    expected = sum((gradient[n] * masks[n]).square().sum() for n in SHAPES).sqrt()
    torch.testing.assert_close(norm, expected)
    opt.step()
    for name, parameter in named.items():
        scale = 1.0 if name.startswith("head") else 1 / child.density
        step = gradient[name] * masks[name] * (0.5 / (expected + 1e-6)) * scale
        torch.testing.assert_close(parameter.detach(), before[name] - step)


def test_task_free_clipping_sees_the_unmasked_gradient() -> None:
    named, gradient = parameters(), random_gradients(1)[0]
    for name, parameter in named.items():
        parameter.grad = gradient[name].clone()
    opt = ChildOptimizer(named.items(), TaskFree(0.2), torch.optim.SGD, lr=1.0)
    expected = sum(g.square().sum() for g in gradient.values()).sqrt()
    torch.testing.assert_close(opt.clip_grad_norm_(float("inf")), expected)
    assert all(torch.equal(named[name].grad, gradient[name]) for name in SHAPES)


def test_clipping_holds_where_a_parameter_has_no_gradient() -> None:
    named, child = parameters(), a_child(0.4)
    opt = ChildOptimizer(named.items(), child, torch.optim.SGD, lr=1.0, rescale=False)
    for name, parameter in named.items():
        parameter.grad = None if name == "b.weight" else torch.full(SHAPES[name], 1e3, dtype=torch.float64)
    before = detached(named)
    opt.clip_grad_norm_(1.0)
    opt.step()
    moved = torch.cat([(named[name].detach() - before[name]).flatten() for name in SHAPES])
    assert float(moved.norm()) == pytest.approx(1.0, rel=1e-4)


def test_groups_without_trained_parameters_and_with_keys_of_their_own() -> None:
    for empty_first in (True, False):
        named = parameters()
        child = Child.from_masks({"a.weight": torch.eye(7, 5).bool()})
        trained = {"params": [("a.weight", named["a.weight"])], "name": "trained", "initial_lr": 0.1}
        frozen = {"params": [(n, p) for n, p in named.items() if n != "a.weight"], "name": "frozen"}
        groups = [frozen, trained] if empty_first else [trained, frozen]
        opt = ChildOptimizer(groups, child, torch.optim.AdamW, lr=0.1)
        run(opt, named, random_gradients(2))
        assert [group["name"] for group in opt.param_groups] == [group["name"] for group in groups]


def test_sparse_gradients() -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(10, 4, sparse=True)
    before = embedding.weight.detach().clone()
    child = select_child({"weight": torch.rand(10, 4)}, 0.5)
    opt = ChildOptimizer(embedding.named_parameters(), child, torch.optim.SGD, lr=1.0, rescale=False)
    embedding(torch.tensor([1, 1, 3])).sum().backward()
    opt.step()
    count = torch.tensor([0, 2, 0, 1, 0, 0, 0, 0, 0, 0]).unsqueeze(1)
    torch.testing.assert_close(embedding.weight.detach(), before - count * child.mask("weight"))


def test_a_tiny_learning_rate_hides_no_mixing_of_coordinates() -> None:
    with pytest.raises(ConfigError, match="Muon"):
        ChildOptimizer(parameters(torch.float32).items(), a_child(), torch.optim.Muon, lr=0.0)


def test_gradients_accumulated_after_clipping_are_not_lost() -> None:
    named, child = parameters(), a_child(0.3)
    for name, parameter in named.items():
        parameter.grad = torch.ones(SHAPES[name], dtype=torch.float64)
    opt = ChildOptimizer(named.items(), child, torch.optim.SGD, lr=1.0, rescale=False)
    opt.clip_grad_norm_(1e9)
    before = detached(named)
    for parameter in named.values():
        if parameter.grad is not None:
            parameter.grad += 1
    opt.step()
    mask = child.mask("a.weight")
    torch.testing.assert_close(named["a.weight"].detach()[mask], before["a.weight"][mask] - 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["fixed", "task-free"])
def test_resume_is_bitwise(dtype, kind) -> None:
    child = a_child(0.3) if kind == "fixed" else TaskFree(0.3, seed=3)
    gradients = random_gradients(20)
    straight = parameters(dtype)
    run(ChildOptimizer(straight.items(), child, torch.optim.AdamW, **ADAMW), straight, gradients)
    first = parameters(dtype)
    opt = ChildOptimizer(first.items(), child, torch.optim.AdamW, **ADAMW)
    run(opt, first, gradients[:9])
    saved, weights = copy.deepcopy(opt.state_dict()), detached(first)
    second = parameters(dtype, seed=77)
    resumed = ChildOptimizer(second.items(), child, torch.optim.AdamW, **ADAMW)
    resumed.load_state_dict(saved)
    with torch.no_grad():
        for name, parameter in second.items():
            parameter.copy_(weights[name])
    run(resumed, second, gradients[9:])
    for name in SHAPES:
        assert torch.equal(straight[name], second[name])


def test_state_of_another_child_is_refused() -> None:
    saved = ChildOptimizer(parameters().items(), a_child(0.3), torch.optim.AdamW).state_dict()
    with pytest.raises(ParameterError, match="another child"):
        ChildOptimizer(parameters().items(), a_child(0.4), torch.optim.AdamW).load_state_dict(saved)


def test_gradients_are_left_as_they_were() -> None:
    """A second step on the same gradients is the same step."""
    named, child, gradient = parameters(), a_child(0.5, "parameter"), random_gradients(1)[0]
    assert any(part.is_whole for part in child.parts.values())
    for name, parameter in named.items():
        parameter.grad = gradient[name].clone()
    opt = ChildOptimizer(named.items(), child, torch.optim.SGD, lr=1.0)
    for _ in range(2):
        before = detached(named)
        opt.step()
        for name, part in child.parts.items():
            if part.is_whole:
                torch.testing.assert_close(
                    before[name] - named[name].detach(), gradient[name] / child.density
                )
    assert all(p.grad is None or torch.equal(p.grad, gradient[name]) for name, p in named.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device to move a model to")
def test_a_model_moved_after_its_optimizer_is_noticed() -> None:
    model = nn.Linear(4, 3)
    child = select_child({name: torch.rand(p.shape) for name, p in model.named_parameters()}, 0.3)
    opt = ChildOptimizer(model.named_parameters(), child)
    model.to("cuda")
    with pytest.raises(ParameterError, match="Move it first"):
        opt.step()


@pytest.mark.parametrize("through_data", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_values_written_from_outside_are_kept(through_data: bool, dtype: torch.dtype) -> None:
    named, child = parameters(dtype), a_child(0.3)
    opt = ChildOptimizer(named.items(), child, torch.optim.SGD, lr=0.0)
    run(opt, named, random_gradients(1))
    written, mask = (
        torch.where(child.mask("a.weight"), 2.0, named["a.weight"].detach()),
        child.mask("a.weight"),
    )
    with torch.no_grad():
        (named["a.weight"].data if through_data else named["a.weight"]).copy_(written)
    run(opt, named, random_gradients(1))
    assert torch.equal(named["a.weight"].detach()[mask], torch.full((int(mask.sum()),), 2.0, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["a.weight", "b.weight"], ids=["partly trained", "frozen"])
def test_a_write_to_a_frozen_entry_is_refused(name: str, dtype: torch.dtype) -> None:
    named = parameters(dtype)
    child = Child.from_masks({"a.weight": torch.eye(7, 5).bool(), "b.weight": torch.zeros(3, 7).bool()})
    opt = ChildOptimizer(named.items(), child, torch.optim.SGD, lr=0.1)
    run(opt, named, random_gradients(1))
    with torch.no_grad():
        named[name][1, 4] += 1
    with pytest.raises(ParameterError, match=f"entries of '{name}' outside the child have changed"):
        run(opt, named, random_gradients(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_changed_signs_do_not_cancel(dtype: torch.dtype) -> None:
    named = parameters(dtype)
    opt = ChildOptimizer(named.items(), a_child(0.3), torch.optim.SGD, lr=0.1)
    frozen = (~opt.child.mask("a.weight")).nonzero()
    for one in range(1, len(frozen)):
        places = tuple(frozen[[0, one]].T)
        with torch.no_grad():
            named["a.weight"][places] = -named["a.weight"][places]
        with pytest.raises(ParameterError, match="outside the child have changed"):
            run(opt, named, random_gradients(1))
        with torch.no_grad():
            named["a.weight"][places] = -named["a.weight"][places]


def test_observed_gradients_are_cleared_with_the_others() -> None:
    named = parameters()
    child = Child.from_masks({"a.weight": torch.eye(7, 5).bool(), "b.weight": torch.zeros(3, 7).bool()})
    opt = ChildOptimizer(named.items(), child, torch.optim.SGD, lr=0.1)
    opt.observe()
    for _ in range(2):
        opt.zero_grad()
        sum(p.square().sum() for p in named.values()).backward()  # type: ignore[union-attr]
        assert torch.equal(named["b.weight"].grad, 2 * named["b.weight"])
        opt.step()


def test_a_change_on_purpose_is_accepted_once_it_is_told() -> None:
    named, child = parameters(), a_child(0.3)
    opt = ChildOptimizer(named.items(), child, torch.optim.SGD, lr=0.1)
    with torch.no_grad():
        named["a.weight"].zero_()
    opt.accept_weights()
    run(opt, named, random_gradients(1))
    assert not named["a.weight"][~child.mask("a.weight")].any()
    with torch.no_grad():
        named["a.weight"][~child.mask("a.weight")] = 1.0
    with pytest.raises(ParameterError, match=r"accept_weights\(\)"):
        run(opt, named, random_gradients(1))


def test_the_same_base_may_be_loaded_again() -> None:
    named, child = parameters(), a_child(0.3)
    before = detached(named)
    opt = ChildOptimizer(named.items(), child, torch.optim.SGD, lr=0.1)
    run(opt, named, random_gradients(2))
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(before[name])
    run(opt, named, random_gradients(1))


def test_a_deep_copy_goes_on_by_itself() -> None:
    for child in (a_child(0.3), TaskFree(0.3)):
        named = parameters()
        opt = ChildOptimizer(named.items(), child, **ADAMW)
        run(opt, named, random_gradients(2))
        copied_named, copied = copy.deepcopy((named, opt))
        run(opt, named, random_gradients(3, seed=5))
        run(copied, copied_named, random_gradients(3, seed=5))
        assert all(torch.equal(named[name], copied_named[name]) for name in SHAPES)


def test_groups_schedulers_and_closures() -> None:
    named, child = parameters(), a_child(0.3)
    groups = [
        {"params": [(n, p) for n, p in named.items() if n.startswith("a")], "lr": 0.5},
        {"params": [(n, p) for n, p in named.items() if not n.startswith("a")]},
    ]
    opt = ChildOptimizer(groups, child, torch.optim.SGD, lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (step + 1))
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    assert opt.step(lambda: 3.5) == 3.5
    schedule.step()
    opt.step()
    assert [group["lr"] for group in opt.inner.param_groups] == [0.25, 0.05]
    with pytest.raises(ParameterError, match="cannot be added"):
        opt.add_param_group({"params": []})


def test_names_are_required_and_must_fit() -> None:
    named = parameters()
    with pytest.raises(ParameterError, match="named_parameters"):
        ChildOptimizer(named.values(), a_child(), torch.optim.AdamW)
    with pytest.raises(ParameterError, match="'b.weight'.*does not have"):
        ChildOptimizer([(n, p) for n, p in named.items() if n != "b.weight"], a_child(), torch.optim.AdamW)
    with pytest.raises(ParameterError, match="matched no parameter"):
        ChildOptimizer(named.items(), a_child(always=("classifier.*",)), torch.optim.AdamW)
    named["a.bias"] = nn.Parameter(torch.zeros(9))
    with pytest.raises(ParameterError, match=r"\[9\].*\[7\]"):
        ChildOptimizer(named.items(), a_child(), torch.optim.AdamW)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod."])
def test_wrapped_names_are_understood(prefix: str) -> None:
    named, child = parameters(), a_child(0.3)
    wrapped = {prefix + name: parameter for name, parameter in named.items()}
    plain = parameters()
    gradients = random_gradients(5)
    for kind in (child, TaskFree(0.3)) if prefix == "_orig_mod." else (child,):
        ours, theirs = ChildOptimizer(wrapped.items(), kind), ChildOptimizer(plain.items(), kind)
        run(theirs, plain, gradients)
        run(ours, named, gradients)
        assert all(torch.equal(named[name], plain[name]) for name in SHAPES)
