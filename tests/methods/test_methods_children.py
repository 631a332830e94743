"""Methods that say which parameters are trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.methods.trainers import check_resume, method_trainer, weights

from childtuning import Child, Delta, density_for_mass, select_child
from childtuning.errors import ConfigError, ModelError, ParameterError
from childtuning.methods import Combination
from childtuning.training import find_layers

HEAD = {"classifier.weight", "classifier.bias"}


def moved(model: Path, output: Path, method: str) -> set[str]:
    trainer = method_trainer(model, output, method, save_strategy="no")
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_head_trains_the_new_head_alone(tiny_bert: Path, tmp_path: Path) -> None:
    assert moved(tiny_bert, tmp_path, "head") == HEAD


def test_last_k_trains_the_top_and_the_head(tiny_bert: Path, tmp_path: Path) -> None:
    trained = moved(tiny_bert, tmp_path, "last-k:1")
    assert trained > HEAD
    rest = trained - HEAD
    assert {name.split(".")[1] for name in rest} == {"encoder", "pooler"}
    assert all("layer.1." in name for name in rest if "encoder" in name)


def test_bitfit_trains_biases_and_the_head(tiny_bert: Path, tmp_path: Path) -> None:
    trained = moved(tiny_bert, tmp_path, "bitfit")
    assert trained > HEAD
    assert all(name.endswith("bias") for name in trained - HEAD) and len(trained) > 15


@pytest.mark.parametrize(
    "method", ["freeze:1+full", "freeze:1+child-d", "freeze:1+child-f", "freeze:1+bitfit"]
)
def test_freeze_keeps_what_is_near_the_input(tiny_bert: Path, tmp_path: Path, method: str) -> None:
    trained = moved(tiny_bert, tmp_path, method)
    assert trained > HEAD and any("layer.1." in name for name in trained)
    assert not any("embeddings" in name or "layer.0." in name for name in trained)


def test_layers_that_are_not_there_are_refused(tiny_bert: Path, tmp_path: Path) -> None:
    for method in ("last-k:3", "freeze:3"):
        with pytest.raises(ModelError, match="the model has 2"):
            method_trainer(tiny_bert, tmp_path, method)


def test_a_plain_network_has_layers_and_a_head() -> None:
    blocks = [torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU()) for _ in range(2)]
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Sequential(*blocks), torch.nn.Linear(3, 2))
    assert len(find_layers(net).layers) == 2
    assert Combination.parse("head").prepare(net, ()).eligible == ("2.weight", "2.bias")
    last = Combination.parse("last-k:1").prepare(net, ("2.weight", "2.bias"))
    assert last.eligible == ("1.1.0.weight", "1.1.0.bias")


class TestDynamic:
    def test_an_interval_beyond_the_end_is_child_d_bitwise(self, tiny_bert: Path, tmp_path: Path) -> None:
        trained = []
        for method in ("child-d", "child-dynamic:1000"):
            trainer = method_trainer(tiny_bert, tmp_path / method, method, save_strategy="no")
            trainer.train()
            trained.append(weights(trainer))
        ours, theirs = trained
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    @pytest.mark.parametrize("granularity", ["element", "row"])
    def test_only_what_was_ever_chosen_moves(self, tiny_bert: Path, tmp_path: Path, granularity: str) -> None:
        trainer = method_trainer(
            tiny_bert,
            tmp_path,
            "child-dynamic:6",
            density=0.1,
            child={"granularity": granularity},
            save_strategy="no",
        )
        before, first = weights(trainer), trainer.select()
        trainer.train()
        after, last, ever = weights(trainer), trainer.child, trainer.touched
        assert isinstance(first, Child) and isinstance(last, Child) and ever is not None
        assert 0 < first.overlap(last) < 1
        assert ever.num_trained > last.num_trained
        assert first.overlap(ever) == last.overlap(ever) == 1
        for name in ever.parts:
            assert torch.equal(before[name][~ever.mask(name)], after[name][~ever.mask(name)])
        state = trainer.child_optimizer.inner.state
        assert sum(s["exp_avg"].numel() for s in state.values()) == last.num_trained + sum(
            before[name].numel() for name in HEAD
        )
        model = method_trainer(tiny_bert, tmp_path, "full").bare_model
        trainer.delta().apply_(model)
        assert all(torch.equal(p, after[name]) for name, p in model.named_parameters())

    def test_entries_that_stay_keep_their_state(self, tiny_bert: Path, tmp_path: Path) -> None:
        """The optimizer with a new child acts on the entries that stay as if nothing had happened."""
        generator = torch.Generator().manual_seed(3)
        start = torch.randn(6, 5, generator=generator)
        masks = [torch.rand(6, 5, generator=generator) < 0.5 for _ in range(2)]
        gradients = [torch.randn(6, 5, generator=generator) for _ in range(6)]
        from childtuning import ChildOptimizer

        def run(children: list[Child], square: torch.Tensor | None) -> torch.Tensor:
            weight = torch.nn.Parameter(start.clone())
            optimizer = ChildOptimizer([("w", weight)], children[0], lr=0.1, rescale=False, weight_decay=0.1)
            for step, gradient in enumerate(gradients):
                if step == 3 and len(children) > 1:
                    optimizer.reselect(children[1], {"w": square} if square is not None else None)
                weight.grad = gradient.clone()
                optimizer.step()
            return weight.detach()

        first, second = (Child.from_masks({"w": mask}) for mask in masks)
        stay, leave = masks[0] & masks[1], masks[0] & ~masks[1]
        alone = run([first], None)
        for square in (None, torch.ones(6, 5)):
            changed = run([first, second], square)
            assert torch.equal(changed[stay], alone[stay])
            assert torch.equal(changed[~masks[0] & ~masks[1]], start[~masks[0] & ~masks[1]])
            assert bool((changed[leave] != alone[leave]).all())
        joined = masks[1] & ~masks[0]
        weight, moment = start.double()[joined].clone(), torch.zeros(int(joined.sum()), dtype=torch.float64)
        second_moment = (1 - 0.999**3) * torch.ones_like(
            moment
        )  # by which the first step's correction divides
        for step in range(3, 6):
            g = gradients[step].double()[joined]
            weight -= 0.1 * 0.1 * weight
            moment, second_moment = 0.9 * moment + 0.1 * g, 0.999 * second_moment + 0.001 * g * g
            m, v = moment / (1 - 0.9 ** (step + 1)), second_moment / (1 - 0.999 ** (step + 1))
            weight -= 0.1 * m / (v.sqrt() + 1e-8)
        assert torch.allclose(run([first, second], torch.ones(6, 5))[joined].double(), weight, atol=1e-5)

    def test_resume_is_bitwise(self, tiny_bert: Path, tmp_path: Path) -> None:
        check_resume(tiny_bert, tmp_path, "child-dynamic:3", density=0.2)

    def test_bad_interval(self) -> None:
        with pytest.raises(ConfigError, match="at least 1 step, got 0"):
            Combination.parse("child-dynamic:0")


class TestPruned:
    @pytest.mark.parametrize("granularity", ["element", "row"])
    def test_the_child_alone_is_left(self, tiny_bert: Path, tmp_path: Path, granularity: str) -> None:
        trainer = method_trainer(
            tiny_bert,
            tmp_path,
            "child-pruned",
            density=0.4,
            child={"granularity": granularity},
            save_strategy="no",
        )
        before, child = weights(trainer), trainer.select()
        trainer.train()
        after = weights(trainer)
        assert isinstance(child, Child)
        twin = method_trainer(tiny_bert, tmp_path, "child-d", density=0.4, child={"granularity": granularity})
        same = twin.select()
        assert isinstance(same, Child) and same.fingerprint() == child.fingerprint()
        for name in child.parts:
            outside = ~child.mask(name)
            kept = before[name] if before[name].ndim == 1 else torch.zeros_like(before[name])
            assert torch.equal(after[name][outside], kept[outside])
        moved = sum(int((before[n] != after[n])[child.mask(n)].sum()) for n in child.parts)
        assert moved > 0.5 * child.num_trained
        model = method_trainer(tiny_bert, tmp_path, "full").bare_model
        trainer.delta().apply_(model)
        assert all(torch.equal(p, after[name]) for name, p in model.named_parameters())

    def test_resume_is_bitwise(self, tiny_bert: Path, tmp_path: Path) -> None:
        check_resume(tiny_bert, tmp_path, "child-pruned", density=0.2)

    def test_no_preset(self, tiny_bert: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no official preset"):
            method_trainer(tiny_bert, tmp_path, "child-pruned", child={"preset": "official"})


class TestMass:
    @pytest.mark.parametrize("mass", [0.01, 0.5, 0.9, 0.999, 1.0])
    def test_the_smallest_child_that_holds_it(self, mass: float) -> None:
        generator = torch.Generator().manual_seed(0)
        scores = {f"p{i}": torch.rand(50, 40, generator=generator) ** 8 for i in range(3)}
        child = select_child(scores, "auto", mass=mass)
        held = sum(float(scores[n].double()[child.mask(n)].sum()) for n in scores)
        total = sum(float(score.double().sum()) for score in scores.values())
        chosen = torch.cat([scores[n][child.mask(n)] for n in scores])
        assert held >= mass * total * (1 - 1e-9)
        assert held - float(chosen.min()) < mass * total or child.num_trained == 1

    def test_rows(self) -> None:
        scores = {"w": torch.tensor([[4.0, 4.0], [1.0, 1.0], [0.0, 0.0], [3.0, 2.0]])}
        assert density_for_mass(scores, 0.5, granularity="row") == 0.25
        assert density_for_mass(scores, 0.8, granularity="row") == 0.5

    def test_ties_and_zeros(self) -> None:
        assert density_for_mass({"w": torch.ones(10)}, 0.3) == 0.3
        assert density_for_mass({"w": torch.tensor([1.0, 0.0, 0.0, 0.0])}, 1.0) == 0.25
        assert density_for_mass({"w": torch.zeros(4)}, 0.5) == 1.0

    def test_in_training(self, tiny_bert: Path, tmp_path: Path) -> None:
        trainer = method_trainer(tiny_bert, tmp_path, "child-d", density="auto", child={"mass": 0.5})
        child = trainer.select()
        assert isinstance(child, Child) and 0 < child.density < 0.5

    def test_bad_input(self) -> None:
        with pytest.raises(ParameterError, match="not all numbers"):
            density_for_mass({"w": torch.tensor([1.0, -1.0])}, 0.5)
        with pytest.raises(ParameterError, match="not all numbers"):
            density_for_mass({"w": torch.tensor([1.0, float("nan")])}, 0.5)
        with pytest.raises(ConfigError, match="mass must be a share"):
            density_for_mass({"w": torch.ones(2)}, 1.5)


def test_the_delta_of_whole_parameters_is_small(tiny_bert: Path, tmp_path: Path) -> None:
    trainer = method_trainer(tiny_bert, tmp_path, "head", save_strategy="no", max_steps=1)
    trainer.train()
    delta = trainer.delta()
    assert isinstance(delta, Delta) and set(delta.values) == HEAD
    assert trainer.child_optimizer.num_state_bytes < 1000
