"""mixout and reinit: what changes where training starts from."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.methods.trainers import check_resume, examples, method_trainer, weights
from tests.reference.fisher_loop import per_example
from tests.reference.mixout import MixoutTwin
from torch import nn
from transformers import (
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
    TrainerCallback,
    set_seed,
)

from childtuning import fisher_information
from childtuning.errors import ConfigError, ModelError
from childtuning.methods import Combination, Mixout, Reinit
from childtuning.training import Prepared, find_layers, task_head
from childtuning.training.mixed_linear import mix

HEAD = ("classifier.weight", "classifier.bias")


def a_bert(folder: Path) -> BertForSequenceClassification:
    set_seed(0)
    return BertForSequenceClassification.from_pretrained(folder, num_labels=2)


def a_gpt2(cls: Any = GPT2ForSequenceClassification) -> Any:
    set_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return cls(GPT2Config(**sizes, pad_token_id=0))


def a_batch(start: int = 0, count: int = 4) -> dict[str, torch.Tensor]:
    rows = examples()[start : start + count]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


# mixout


def moved(model: nn.Module, amount: float = 0.1) -> None:
    """Take every parameter away from where it started."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += amount * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


@dataclass(eq=False)
class Begins:
    """What mixout reads of a trainer."""

    bare_model: nn.Module
    always: tuple[str, ...]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_mixout_is_its_twin_over_twenty_steps(tiny_bert: Path, family: str) -> None:
    model = (a_bert(tiny_bert) if family == "bert" else a_gpt2()).double().train()
    head = task_head(model)
    mixed = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and f"{name}.weight" not in head
    ]
    assert len(mixed) == (13 if family == "bert" else 8)
    twin = MixoutTwin(model, 0.7, mixed)
    method = Mixout(0.7)
    trainer = Begins(model, head)
    method.begin(trainer)  # type: ignore[arg-type]
    ours = torch.optim.AdamW(model.parameters(), lr=1e-2)
    theirs = torch.optim.AdamW(twin.parameters.values(), lr=1e-2)
    for step in range(20):
        batch = a_batch(step)
        torch.manual_seed(step)
        loss = model(**batch).loss
        ours.zero_grad()
        loss.backward()
        torch.manual_seed(step)
        expected = twin.backward(batch)
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-9, atol=0)
        for name, parameter in model.named_parameters():
            wanted = twin.parameters[name].grad
            if wanted is None:
                assert parameter.grad is None
            else:
                torch.testing.assert_close(parameter.grad, wanted, rtol=1e-6, atol=1e-12)
        ours.step()
        theirs.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, twin.parameters[name], rtol=1e-6, atol=1e-9)
    start = twin.start[mixed[0]]
    assert (twin.parameters[mixed[0]] - start).abs().max() > 1e-2  # so that mixing was not idle
    method.end(model)


def test_mixed_weights_scatter_around_the_weight() -> None:
    layer = nn.Linear(40, 50).double()
    start = layer.weight.detach().clone()
    mixed = mix(layer, 0.6)
    moved(layer)
    draws = torch.stack([layer.mixed_weight().detach() for _ in range(400)])  # type: ignore[operator]
    back = draws == start
    assert abs(float(back.double().mean()) - 0.6) < 0.01
    shifted = start + (layer.weight - start) / 0.4
    assert torch.allclose(torch.where(back, shifted, draws), shifted)
    assert not torch.equal(back[0], back[1])
    mixed.remove()


def test_mixout_gradient_is_exact_numerically() -> None:
    layer = nn.Linear(3, 2).double()
    mix(layer, 0.5)
    moved(layer)
    x = torch.randn(4, 3, dtype=torch.double, requires_grad=True)

    def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(forward, (x, layer.weight.detach().clone().requires_grad_()))


@pytest.mark.parametrize("family", ["bert", "gpt2", "gpt2 LM"])
def test_mixout_comes_and_goes_without_a_trace(tiny_bert: Path, family: str) -> None:
    model = (
        a_bert(tiny_bert)
        if family == "bert"
        else a_gpt2(GPT2LMHeadModel if "LM" in family else GPT2ForSequenceClassification)
    )
    classes = {name: type(module) for name, module in model.named_modules()}
    shares = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    batch = a_batch() if "LM" not in family else {**a_batch(), "labels": a_batch()["input_ids"]}
    with torch.no_grad():
        plain = model.eval()(**batch).logits
    method = Mixout()
    trainer = Begins(model, task_head(model))
    method.begin(trainer)  # type: ignore[arg-type]
    assert all(module.p == 0 for module in model.modules() if isinstance(module, nn.Dropout))
    changed = {name for name, module in model.named_modules() if type(module) is not classes[name]}
    assert not changed & {"classifier", "score", "lm_head", "transformer.wte"} and len(changed) >= 8
    assert model.state_dict().keys() == state.keys()
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, plain)
        first = model.train()(**batch).logits
        assert torch.equal(first, plain)  # nothing has moved, and there is no dropout
        twin = copy.deepcopy(model)
        moved(model)
        assert not torch.equal(model(**batch).logits, model(**batch).logits)
        assert torch.equal(twin(**batch).logits, plain)
        for name, value in model.state_dict().items():
            value.copy_(state[name])
    method.end(model)
    method.end(model)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == shares
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name for name, _ in model.named_buffers()} == {
        name for name, _ in a_bert(tiny_bert).named_buffers()
    } or family != "bert"


def test_mixout_switches_off_dropout_that_is_a_number() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention_dropout, self.layerdrop, self.scale = 0.1, 0.2, 0.5
            self.out = nn.Linear(2, 2)

    model = Attention()
    method = Mixout()
    trainer = Begins(model, ())
    method.begin(trainer)  # type: ignore[arg-type]
    assert (model.attention_dropout, model.layerdrop, model.scale) == (0.0, 0.2, 0.5)
    method.end(model)
    assert model.attention_dropout == 0.1


def test_mixout_needs_a_linear_layer_behind_the_head() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2))
    with pytest.raises(ModelError, match="no linear layer except the head"):
        Mixout().prepare(Prepared(model, ("2.weight", "2.bias")))
    for p in (0.0, 1.0, -0.1):
        with pytest.raises(ConfigError, match="p of 'mixout'"):
            Mixout(p)


@pytest.mark.parametrize("child", [{}, {"granularity": "row"}], ids=str)
def test_mixout_beside_a_child(tiny_bert: Path, tmp_path: Path, child: dict[str, Any]) -> None:
    """The child's entries alone move; every linear layer but the head mixes while it trains."""

    class Look(TrainerCallback):
        def on_step_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
            self.mixed = [name for name, module in model.named_modules() if hasattr(module, "start_weight")]

    look = Look()
    trainer = method_trainer(
        tiny_bert, tmp_path, "child-d+mixout", child=child, callbacks=[look], max_steps=4, save_strategy="no"
    )
    before = weights(trainer)
    trainer.train()
    assert len(look.mixed) == 13 and "classifier" not in look.mixed
    selected, after = trainer.select(), weights(trainer)
    for name, part in selected.parts.items():  # type: ignore[union-attr]
        assert torch.equal(before[name][~part.mask()], after[name][~part.mask()])
    assert not torch.equal(before["classifier.weight"], after["classifier.weight"])
    assert not any(hasattr(module, "start_weight") for module in trainer.bare_model.modules())


@pytest.mark.parametrize("method", ["child-d+mixout", "child-f+mixout", "child-d+reinit:1"])
def test_resume_in_mid_epoch_is_bitwise(tiny_bert: Path, tmp_path: Path, method: str) -> None:
    check_resume(tiny_bert, tmp_path, method, max_steps=9)


def test_resume_of_gpt2_finds_its_transposed_layers(tmp_path: Path) -> None:
    """A task-free child looks for them when it resumes, and mixing layers must still look like what they are."""

    def trainer() -> Any:
        options: dict[str, Any] = {"child": {"granularity": "row"}, "max_steps": 6, "save_steps": 3}
        return method_trainer(a_gpt2(), tmp_path, "child-f+mixout", density=0.3, **options)

    straight, resumed = trainer(), trainer()
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    ours, theirs = weights(straight), weights(resumed)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_each_trainer_of_a_model_keeps_the_weights_that_it_began_with() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    method, first, second = Mixout(), Begins(model, ()), Begins(model, ())

    def began_with(trainer: Begins) -> torch.Tensor:
        method.begin(trainer)  # type: ignore[arg-type]
        start = model[0].start_weight.clone()
        with torch.no_grad():
            model[0].weight.add_(1.0)
        method.end(model)
        return start

    base = model[0].weight.detach().clone()
    assert torch.equal(began_with(first), base)
    assert torch.equal(began_with(second), base + 1)
    assert torch.equal(began_with(first), base) and torch.equal(began_with(second), base + 1)


def test_mixing_layers_have_exact_fisher_information(tiny_bert: Path) -> None:
    model = a_bert(tiny_bert)
    method = Mixout()
    trainer = Begins(model, HEAD)
    method.begin(trainer)  # type: ignore[arg-type]
    moved(model)
    batches = [a_batch(0), a_batch(4, 3)]
    scores = fisher_information(model, batches)
    for name, wanted in per_example(model, batches).items():
        torch.testing.assert_close(scores[name], wanted, rtol=1e-4, atol=1e-10)
    method.end(model)


# reinit


def test_reinit_draws_the_top_layers_and_the_pooler(tiny_bert: Path) -> None:
    model = a_bert(tiny_bert)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(7.0)  # far from any initialisation
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    prepared = Reinit(1).prepare(Prepared(model, HEAD))
    new = {name for name in before if ".layer.1." in name or "pooler" in name}
    assert set(prepared.always) == {*HEAD, *new} and len(prepared.always) == len(set(prepared.always))
    for name, parameter in model.named_parameters():
        if name not in new:
            assert torch.equal(parameter, before[name])
        elif "LayerNorm.weight" in name:
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        else:  # normal with the configuration's standard deviation
            values = parameter.detach() / model.config.initializer_range
            assert abs(float(values.mean())) < 0.3 and 0.8 < float(values.std()) < 1.2
    assert Reinit(0).prepare(Prepared(model, HEAD)).always[2:] == (
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
    )
    with pytest.raises(ModelError, match="needs 3 layers, but the model has 2"):
        Reinit(3).prepare(Prepared(model, HEAD))
    with pytest.raises(ConfigError, match="must not be negative"):
        Reinit(-1)


def test_reinit_is_decided_by_the_seed_and_composes_with_freeze(tiny_bert: Path) -> None:
    states = []
    for order in ("freeze:1+reinit:1", "reinit:1+freeze:1"):
        set_seed(5)
        prepared = Combination.parse(order).prepare(a_bert(tiny_bert), HEAD)
        states.append({name: p.detach().clone() for name, p in prepared.model.named_parameters()})
        assert prepared.eligible == () and any(".layer.1." in name for name in prepared.always)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_reinit_keeps_a_language_models_head_and_last_norm() -> None:
    always = Reinit(1).prepare(Prepared(a_gpt2(GPT2LMHeadModel), ())).always
    assert set(always) == {name for name, _ in a_gpt2().named_parameters() if ".h.1." in name}


def test_reinit_draws_running_statistics_of_a_loaded_model(tmp_path: Path) -> None:
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 2], "layer_type": "basic"}
    before = ResNetForImageClassification(ResNetConfig(**sizes, num_labels=2))
    with torch.no_grad():
        for buffer in before.buffers():
            buffer.fill_(9)
        before.save_pretrained(tmp_path)
    model = ResNetForImageClassification.from_pretrained(tmp_path)
    Reinit(1).prepare(Prepared(model, task_head(model)))
    found = {
        name: set(buffer.flatten().tolist())
        for name, buffer in model.named_buffers()
        if "stages.1.layers.1." in name
    }
    assert len(found) == 6
    for name, values in found.items():
        assert values == ({1.0} if name.endswith("running_var") else {0})
    assert all((b == 9).all() for name, b in model.named_buffers() if name not in found)


def test_reinit_of_any_network() -> None:
    def block() -> nn.Module:
        return nn.ModuleDict({"conv": nn.Conv2d(2, 2, 3, padding=1), "norm": nn.BatchNorm2d(2)})

    model = nn.ModuleDict({"blocks": nn.ModuleList([block(), block()]), "head": nn.Linear(2, 2)})
    with torch.no_grad():
        for tensor in (*model.parameters(), model["blocks"][1]["norm"].running_mean):  # type: ignore[index]
            tensor.fill_(9.0)
    prepared = Reinit(1).prepare(Prepared(model, ("head.weight", "head.bias")))
    assert set(prepared.always) == {"head.weight", "head.bias", *find_layers(model).layers[1]}
    norm = model["blocks"][1]["norm"]  # type: ignore[index]
    assert (norm.weight == 1).all() and (norm.running_mean == 0).all()
    assert (model["blocks"][0]["conv"].weight == 9).all()  # type: ignore[index]
    assert model["blocks"][1]["conv"].weight.abs().max() < 1  # type: ignore[index]

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.matrix = nn.LayerNorm(2), nn.Parameter(torch.randn(2, 2))

    bare = nn.Sequential(nn.ModuleList([Bare(), Bare()]), nn.Linear(2, 2))
    with pytest.raises(ModelError, match="'0.1.matrix' has no method reset_parameters"):
        Reinit(1).prepare(Prepared(bare, ("1.weight", "1.bias")))


def test_what_reinit_draws_is_trained_whole(tiny_bert: Path, tmp_path: Path) -> None:
    trainer = method_trainer(
        tiny_bert, tmp_path, "child-d+reinit:1", density=0.2, max_steps=4, save_strategy="no"
    )
    before = weights(trainer)
    trainer.train()
    child, after = trainer.select(), weights(trainer)
    assert child.num_trained == round(0.2 * child.num_eligible)  # type: ignore[union-attr]
    assert not any(".layer.1." in name or "pooler" in name for name in child.parts)  # type: ignore[union-attr]
    whole = "bert.encoder.layer.1.output.dense.weight"
    assert float((before[whole] != after[whole]).float().mean()) > 0.99
