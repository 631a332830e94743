"""Scores kept elsewhere or in bf16: where they are, what they hold, what they cost, and which child they choose."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from childtuning import select_child
from childtuning.child import ChildConfig
from childtuning.errors import ConfigError
from childtuning.fisher import fisher_information, sums
from childtuning.fisher.loop import differentiable, take_gradients
from childtuning.training.child_choice import fisher_scores


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Times(torch.autograd.Function):
    """A product that nothing can look into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(x, factor)
        return x * factor

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor, Tensor]:
        x, factor = ctx.saved_tensors
        return dY * factor, (dY * x).sum(0)


class Scale(nn.Module):
    """A layer that goes through the loop."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.linspace(0.5, 2, width))

    def forward(self, x: Tensor) -> Tensor:
        return Times.apply(x, self.factor)


def network(hidden: int = 32) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(12, hidden), nn.Tanh(), Scale(hidden), nn.Linear(hidden, hidden), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(hidden, 3))


def batches(count: int, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    scale = torch.logspace(-2, 1, 12)  # so that scores spread as those of pretrained networks do
    return [
        (torch.randn(size, 12, generator=draw) * scale, torch.randint(3, (size,), generator=draw))
        for _ in range(count)
    ]


def scored(model: nn.Module, data: list[Any], **keywords: Any) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Scale takes the loop
        return fisher_information(model, data, cross_entropy, "mean", **keywords)


WAYS = {
    "engine and loop": {},
    "loop": {"training": True},
    "per batch": {"estimator": "per-batch"},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_default_place_by_name_changes_no_bit(way: str) -> None:
    model, data = network(), batches(3)
    plain = scored(model, data, **WAYS[way])
    named = scored(model, data, scores_device="cpu", scores_dtype=torch.float32, **WAYS[way])
    assert list(named) == list(plain)
    for name, score in plain.items():
        assert named[name].dtype == score.dtype == torch.float32
        assert torch.equal(named[name], score) and bool(score.any())


@pytest.mark.parametrize("way", WAYS)
def test_terms_formed_apart_give_the_same_sums(way: str) -> None:
    """A float64 model's squares are formed in float64 and then added to float32 scores."""
    model = network().double()
    data = [(x.double(), y) for x, y in batches(3)]
    wanted = scored(model, data, **WAYS[way])
    found = scored(model, data, scores_dtype=torch.float32, **WAYS[way])
    for name, score in wanted.items():
        assert score.dtype == torch.float64 and found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), score, rtol=1e-6, atol=0)


@pytest.mark.parametrize("way", WAYS)
def test_bf16_scores_are_the_float32_ones_to_their_rounding(way: str) -> None:
    model, data = network(), batches(3)
    wanted = scored(model, data, **WAYS[way])
    found = scored(model, data, scores_device="cpu", scores_dtype=torch.bfloat16, **WAYS[way])
    num_terms = 12 if way == "loop" else 3
    for name, score in wanted.items():
        assert found[name].dtype == torch.bfloat16 and found[name].device.type == "cpu"
        # One rounding moves by less than 2^-7; so does each of a few, and the last by 2^-9.
        most = num_terms if name != "2.factor" else 12
        assert float(((found[name].double() - score) / score).abs().max()) <= 1.1 * (most * 2**-7 + 2**-9)


@pytest.mark.parametrize("name", ["bert", "gpt2-tied-lm", "convnet"])
def test_bf16_scores_of_whole_models(name: str, make_case) -> None:
    case = make_case(name)
    data = [case.batch(4), case.batch(3)]
    wanted = fisher_information(case.model, data, **case.keywords)
    found = fisher_information(case.model, data, scores_dtype=torch.bfloat16, **case.keywords)
    scale = max(float(score.max()) for score in wanted.values())
    for key, score in wanted.items():
        assert found[key].shape == score.shape and found[key].dtype == torch.bfloat16
        assert float((found[key].double() - score - 0.02 * score).max()) <= 1e-12 * scale
        assert float((score - found[key].double() - 0.02 * score).max()) <= 1e-12 * scale


def test_the_rounding_is_drawn_by_the_seed_and_leaves_no_trace() -> None:
    model, data = network(), batches(3)
    state = torch.get_rng_state()
    first, again, other = (scored(model, data, scores_dtype=torch.bfloat16, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_long_pass_in_bf16_is_unbiased_and_chooses_nearly_the_same_child() -> None:
    model = network(48)
    del model[2]  # one term a batch
    data = batches(300, size=2)
    wanted = scored(model, data)
    found = scored(model, data, scores_dtype=torch.bfloat16)
    errors = torch.cat([(found[name].double() / wanted[name] - 1).flatten() for name in wanted])
    deviation = float(errors.square().mean().sqrt())
    assert 0.005 < deviation <= 2**-4
    assert abs(float(errors.mean())) <= 5 * deviation / len(errors) ** 0.5
    child, half = (select_child(scores, 0.1, always=["5.*"]) for scores in (wanted, found))
    assert half.num_trained == child.num_trained == round(0.1 * child.num_eligible)
    assert child.overlap(half) >= 0.97


def test_one_parameter_at_a_time_lives_beside_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref] = []
    counts: list[int] = []
    original = sums.ScoreSums.zero

    def zero(self: sums.ScoreSums, name: str) -> Tensor:
        counts.append(sum(ref() is not None for ref in alive))
        made = original(self, name)
        alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(sums.ScoreSums, "zero", zero)
    model = network()
    scored(model, batches(3), scores_dtype=torch.bfloat16)
    assert len(counts) >= 4 * len(list(model.parameters())) and max(counts) == 0


def test_one_gradient_at_a_time_lives_in_the_loop() -> None:
    model = network()
    parameters = dict(model.named_parameters())
    loss_of = lambda: cross_entropy(model, batches(1)[0])  # noqa: E731
    alive: list[weakref.ref] = []
    counts: list[int] = []
    taken: dict[str, Tensor] = {}

    def take(name: str, gradient: Tensor) -> None:
        counts.append(sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(gradient))
        taken[name] = gradient.clone()

    for parameter in parameters.values():
        parameter.requires_grad_(False)
    with differentiable(parameters.values()):
        take_gradients(loss_of(), parameters, take)
        wanted = torch.autograd.grad(loss_of(), list(parameters.values()))
    assert max(counts) <= 1  # what is being handed over may still be held by its caller
    for name, gradient in zip(parameters, wanted, strict=True):
        assert torch.equal(taken[name], gradient)
    assert all(not parameter._backward_hooks and parameter.grad is None for parameter in parameters.values())


def test_sparse_and_unreached_gradients_are_taken_as_before() -> None:
    table, unused = nn.Embedding(7, 3, sparse=True), nn.Linear(2, 2)
    parameters = {"table": table.weight, "unused": unused.weight}
    taken: dict[str, Tensor] = {}
    take_gradients(table(torch.tensor([1, 1, 4])).square().sum(), parameters, taken.__setitem__)
    assert list(taken) == ["table"] and not taken["table"].is_sparse
    wanted = torch.zeros(7, 3)
    wanted[1], wanted[4] = 4 * table.weight[1].detach(), 2 * table.weight[4].detach()
    torch.testing.assert_close(taken["table"], wanted)


def test_what_is_refused() -> None:
    model, data = network(), batches(1)
    with pytest.raises(ConfigError, match="scores_dtype must be torch.float32 or torch.bfloat16"):
        fisher_information(model, data, cross_entropy, scores_dtype=torch.float16)
    with pytest.raises(ConfigError, match="scores_device must be a device of torch, got 'gpu'"):
        fisher_information(model, data, cross_entropy, scores_device="gpu")


def test_a_configuration_says_where_and_in_what(make_case) -> None:
    case = make_case("bert")
    case.model.float()
    found = {}
    for dtype in ("float32", "bfloat16"):
        config = ChildConfig(fisher_device="cpu", fisher_dtype=dtype)  # type: ignore[arg-type]
        assert ChildConfig.from_dict(config.to_dict()) == config
        found[dtype] = fisher_scores(config, case.model, [case.batch(4)], always=("classifier.*",))
    assert {score.dtype for score in found["bfloat16"].values()} == {torch.bfloat16}
    plain = fisher_scores(ChildConfig(), case.model, [case.batch(4)], always=("classifier.*",))
    assert all(torch.equal(plain[name], score) for name, score in found["float32"].items())
    for wrong in ({"fisher_dtype": "bf16"}, {"fisher_device": "cuda"}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} must be one of"):
            ChildConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="preset='official' sets fisher_dtype itself"):
        ChildConfig(preset="official", fisher_dtype="bfloat16")
