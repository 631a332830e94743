"""`childtuning plan` against what optimizers really hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from childtuning import ChildConfig, ChildOptimizer
from childtuning.errors import ModelError
from childtuning.methods import Combination
from childtuning.runs.plan import plan_memory
from childtuning.training import choose_child, load_classifier


@pytest.mark.parametrize("granularity", ["element", "row"])
@pytest.mark.parametrize("method", ["full", "child-f", "child-random", "last-k:1", "bitfit", "head"])
def test_the_optimizer_holds_what_was_planned(tiny_bert: Path, method: str, granularity: str) -> None:
    methods = Combination.parse(method)
    density = 0.25 if methods.takes_density else 1.0
    options: dict[str, Any] = {"density": density, "granularity": granularity}
    (plan,) = plan_memory(str(tiny_bert), [method], ChildConfig(**options), num_labels=3)
    loaded = load_classifier(str(tiny_bert), num_labels=3)
    prepared = methods.prepare(loaded.model, loaded.new_parameters)
    config = replace(methods.child(ChildConfig(**options)), eligible=prepared.eligible)
    child = choose_child(config, prepared.model, list, always=prepared.always)
    optimizer = ChildOptimizer(prepared.model.named_parameters(), child, torch.optim.AdamW, lr=1e-3)
    prepared.model(input_ids=torch.tensor([[2, 5, 3]]), labels=torch.tensor([1])).loss.backward()
    optimizer.step()
    trained = sum(len(runs) if runs is not None else p.numel() for p, runs in optimizer.trained())
    assert plan.trained_parameters == pytest.approx(trained, rel=0.02)
    assert plan.optimizer == pytest.approx(optimizer.num_state_bytes, rel=0.1)
    assert plan.weights == sum(p.nbytes for p in prepared.model.parameters())


@pytest.mark.parametrize("method", ["l2-sp", "recadam"])
def test_what_a_method_pulls_towards_is_counted(tiny_bert: Path, method: str) -> None:
    plain, pulled = plan_memory(str(tiny_bert), ["full", method])
    always = sum(4 * size for size in (16 * 2, 2))  # the head, which is not pulled
    assert pulled.optimizer - plain.optimizer == plain.weights - always


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("child-pruned", "plan cannot count 'child-pruned'"),
        ("reinit", "plan cannot count 'reinit'"),
        ("prompt", "plan cannot count 'prompt'"),
        ("last-k:9", "last-k:9 needs 9 layers, but the model has 2"),
    ],
)
def test_what_cannot_be_counted_is_told(tiny_bert: Path, method: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        plan_memory(str(tiny_bert), [method])
