"""What a user types for a method, and which methods go together."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from tests.methods.trainers import method_trainer
from torch import Tensor
from transformers import AutoModelForSequenceClassification, XLNetConfig, XLNetForSequenceClassification

from childtuning import ChildConfig
from childtuning.errors import ConfigError
from childtuning.methods import Combination, all_methods, find_method, register, registry
from childtuning.methods.whole import LastK
from childtuning.training import LossStep, Method


def test_options_stand_behind_a_colon() -> None:
    assert Combination.parse("last-k").methods == (LastK(3),)
    assert Combination.parse("last-k:5").methods == (LastK(5),)
    assert Combination.parse("last-k:layers=5").methods == (LastK(5),)
    assert Combination.parse(" last-k : 5 ").methods == (LastK(5),)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("child_d", "Did you mean 'child-d'"),
        ("", "empty part"),
        ("child-d+", "empty part"),
        ("last-k:x", "layers of method 'last-k' must be a whole number, got 'x'"),
        ("last-k:2.5", "must be a whole number"),
        ("last-k:depth=3", "has no option 'depth'. Known: layers"),
        ("last-k:3,4", "got '4' without an option's name"),
        ("last-k:layers=3,layers=4", "twice"),
        ("full:3", "It takes none"),
        ("child-d+child-f", "each sets which parameters are trained"),
        ("child-d+child-d", "given twice"),
        ("last-k:0", "at least 1 layer"),
    ],
)
def test_bad_words_say_what_is_wrong(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Combination.parse(text)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_density_needs_a_child() -> None:
    with pytest.raises(ConfigError, match="trains whole parameters, got density 0.5"):
        Combination.parse("head").child(ChildConfig(density=0.5))


def test_a_budget_does_not_count_added_modules() -> None:
    with pytest.raises(ConfigError, match="does not have lora's modules, got budget state=0.2"):
        Combination.parse("child-d+lora").child(ChildConfig(budget="state=0.2"))


def test_every_method_describes_itself() -> None:
    for method in all_methods():
        assert method.summary and method.source and method.trains and method.memory
        assert method.__doc__ and len(method.summary) < 90, method.name
        assert "\n" not in method.summary


@pytest.fixture
def without_new_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))


def test_a_method_from_outside_trains(without_new_methods: None, tiny_bert: Path, tmp_path: Path) -> None:
    @register
    @dataclass(frozen=True)
    class Flat(Method):
        """Adds a share of the logits' mean square."""

        weight: float = 0.5

        name = "flat"
        summary = "keep logits small"
        source = "—"
        trains = "—"
        memory = "—"
        part = "loss"

        def loss(self, loss: Tensor, step: LossStep) -> Tensor:
            return loss + self.weight * step.weight * step.logits.square().mean()

    sizes = {}
    for method in ("child-d", "child-d+flat:100"):
        trainer = method_trainer(tiny_bert, tmp_path, method, save_strategy="no", max_steps=40)
        trainer.train()
        trainer.bare_model.eval()
        batch = torch.stack([row["input_ids"] for row in trainer.train_dataset])  # type: ignore[union-attr]
        with torch.no_grad():
            sizes[method] = float(trainer.bare_model(batch).logits.square().mean())
    assert sizes["child-d+flat:100"] < 0.3 * sizes["child-d"]


@pytest.mark.parametrize("text", ["head", "head+reinit:1", "bitfit", "bitfit+reinit:1", "adapter:4"])
def test_a_pretrained_head_that_fits_is_trained(tiny_bert: Path, text: str) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    prepared = Combination.parse(text).prepare(model, ())
    trained = {*prepared.always, *(prepared.eligible or ())}
    assert trained >= {"classifier.weight", "classifier.bias"}
    assert ("bert.encoder.layer.1.output.dense.weight" in trained) == ("reinit" in text)


@pytest.mark.parametrize("text", ["lora", "prompt:2"])
def test_modules_are_trained_beside_a_head_that_fits(text: str) -> None:
    sizes = {"vocab_size": 20, "d_model": 8, "n_layer": 2, "n_head": 2, "d_inner": 8}
    model = XLNetForSequenceClassification(XLNetConfig(**sizes))
    head = {name: p.detach().clone() for name, p in model.named_parameters() if "logits_proj" in name}
    prepared = Combination.parse(text).prepare(model, ())
    copies = {
        name: p for name, p in prepared.model.named_parameters() if "logits_proj.modules_to_save" in name
    }
    assert len(copies) == 2 and set(copies) <= set(prepared.always)
    for name, copy in copies.items():
        (own,) = (value for key, value in head.items() if key.rpartition(".")[2] == name.rpartition(".")[2])
        assert torch.equal(copy, own)


def test_layers_that_are_drawn_anew_bear_no_more_than_fulls_rate() -> None:
    rates = {
        text: Combination.parse(text).rate for text in ("head", "head+reinit:1", "bitfit+reinit:1", "lora")
    }
    assert rates == {"head": 300.0, "head+reinit:1": 1.0, "bitfit+reinit:1": 1.0, "lora": 3.0}


def test_register_refuses(without_new_methods: None) -> None:
    class Nameless(Method):
        pass

    with pytest.raises(ConfigError, match="has no name"):
        register(Nameless)

    def named(word: str) -> type[Method]:
        fields = {"name": word, "summary": "s", "source": "s", "trains": "t", "memory": "m", "part": "loss"}
        return dataclass(frozen=True)(type("Other", (Method,), fields))

    with pytest.raises(ConfigError, match="there is already a method 'full'"):
        register(named("full"))
    with pytest.raises(ConfigError, match="must contain none of"):
        register(named("a+b"))


@pytest.mark.parametrize("method", ["head", "lora", "adapter", "freeze+child-d", "lora+child-d"])
def test_patterns_have_no_place_beside_methods_that_choose(method: str) -> None:
    methods = Combination.parse(method)
    config = ChildConfig(density=methods.density, eligible=("bert.pooler.*",))
    with pytest.raises(ConfigError, match="sets the eligible parameters itself. Leave out eligible"):
        methods.child(config)


@pytest.mark.parametrize("method", [method for method in all_methods() if method.acts_on_pretrained])
def test_what_acts_on_pretrained_weights_is_refused_beside_modules(method: type[Method]) -> None:
    with pytest.raises(ConfigError, match="which 'lora' freezes"):
        Combination.parse(f"{method.name}+lora")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("a_package_that_is_not_there:Ours", "'ours' cannot be loaded from a_package_that_is_not_there:Ours"),
        ("json:dumps", "json:dumps, declared as method 'ours', is not a subclass of Method"),
    ],
)
def test_a_broken_declaration_is_named(module: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    declared = EntryPoint("ours", module, registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [declared])
    registry._load_declared.cache_clear()
    with pytest.raises(ConfigError, match=message):
        find_method("not-there")
    registry._load_declared.cache_clear()
