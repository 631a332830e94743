"""The rate and the epochs that suit a model and its examples."""

from __future__ import annotations

import pytest
import transformers as tf
from torch import nn

from childtuning.methods import Combination
from childtuning.methods.registry import all_methods
from childtuning.training import layer_width, suggested_epochs, suggested_rate

SIZE = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2}


def a_gpt2() -> nn.Module:
    return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50))


@pytest.mark.parametrize(
    ("model", "width"),
    [
        (lambda: tf.BertForSequenceClassification(tf.BertConfig(**SIZE, vocab_size=3000)), 48),
        (lambda: tf.ViTForImageClassification(tf.ViTConfig(**SIZE, image_size=8, patch_size=4)), 48),
        (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZE, vocab_size=50)), 48),
        (a_gpt2, 32),
        (lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 2)), 144),
        (lambda: nn.Embedding(10, 4), 768),
    ],
)
def test_the_width_is_that_of_a_typical_layer(model, width: int) -> None:
    assert layer_width(model()) == width


def test_the_rate_falls_with_the_width_and_grows_with_the_method() -> None:
    narrow, wide = nn.Linear(384, 384), nn.Linear(4096, 4096)
    assert suggested_rate(nn.Linear(768, 768)) == 5e-5
    assert suggested_rate(narrow) == 1e-4
    assert suggested_rate(wide) == 9.4e-6
    assert suggested_rate(narrow, Combination.parse("lora").rate) == 3e-4


@pytest.mark.parametrize(
    ("method", "rate"),
    [("child-d", 1), ("child-d+lora", 3), ("mixout+full", 1), ("r3f", 1), ("head+r3f", 300), ("bitfit", 50)],
)
def test_a_combination_takes_the_rate_of_what_it_trains(method: str, rate: float) -> None:
    assert Combination.parse(method).rate == rate


def test_every_method_that_adds_modules_has_a_rate_of_its_own() -> None:
    assert all(method.rate > 1 for method in all_methods() if method.part == "modules")


@pytest.mark.parametrize(
    ("examples", "batch", "epochs"),
    [(1, 16, 20), (100, 16, 20), (500, 16, 10), (1000, 16, 5), (1000, 64, 20), (10_000, 16, 3)],
)
def test_few_examples_are_seen_more_often(examples: int, batch: int, epochs: int) -> None:
    assert suggested_epochs(examples, batch) == epochs
