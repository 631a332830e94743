"""Class weights: the formula, the Fisher pass against its definition, and what they change."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from childtuning.errors import ConfigError
from childtuning.runs import RunConfig, train_run
from childtuning.runs.begin import begin
from childtuning.runs.inputs import Inputs
from childtuning.runs.trainer import build_trainer
from childtuning.tasks.class_weights import BalancedLoss

WEIGHTS = {"bad": 40 / (2 * 35), "good": 40 / (2 * 5)}


@pytest.fixture(scope="module")
def config(tiny_bert: Path, sentiment: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run on 35 bad and 5 good sentences."""
    lines = (sentiment / "train.jsonl").read_text().splitlines()
    rows = {label: [line for line in lines if f'"{label}"' in line] for label in WEIGHTS}
    file = tmp_path_factory.mktemp("imbalanced") / "train.jsonl"
    file.write_text("\n".join([*rows["bad"][:35], *rows["good"][:5]]) + "\n")
    files = {"train": str(file), "eval": str(sentiment / "dev.jsonl"), "model": str(tiny_bert)}
    return RunConfig(**files, method="child-d", learning_rate=3e-3, epochs=3.0, batch_size=8)


def test_the_loss_is_the_formula() -> None:
    logits, labels = torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 1, 2])
    fn = BalancedLoss([0] * 6 + [1] * 3 + [2], 3)
    assert fn.weights.tolist() == pytest.approx([10 / 18, 10 / 9, 10 / 3])
    each = fn.weights[labels] * cross_entropy(logits, labels, reduction="none")
    assert fn({"logits": logits}, labels) == pytest.approx(float(each.mean()))
    assert fn({"logits": logits}, labels, 12) == pytest.approx(float(each.sum()) / 12)
    assert BalancedLoss([0, 0, 2], 3).weights[[0, 2]].tolist() == pytest.approx([0.75, 1.5])


def test_fisher_sees_the_loss_that_is_trained(config: RunConfig, tmp_path: Path) -> None:
    scores: dict[str, torch.Tensor] = {}
    begun = begin(replace(config, class_weights="balanced").resolved(), Inputs(), None, print)
    trainer = build_trainer(
        begun.config,
        begun.task,
        begun.train,
        begun.loaded,
        tmp_path,
        progress=False,
        scores=lambda make_fn: scores.update(make_fn()) or scores,
    )
    trainer.select()
    model = trainer.bare_model.eval()
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters() if name in scores}
    for row in begun.train:
        batch = trainer.data_collator([row])
        model.zero_grad()
        label = begun.task.label_names[int(batch["labels"])]
        (WEIGHTS[label] * model(**batch).loss).backward()
        for name, total in expected.items():
            total += model.get_parameter(name).grad ** 2 / len(begun.train)  # type: ignore[operator]
    assert scores
    for name, total in expected.items():
        torch.testing.assert_close(scores[name].float().view_as(total), total, rtol=1e-3, atol=1e-9)


def test_the_rare_class_is_found_more_often(config: RunConfig, tmp_path: Path) -> None:
    recall = []
    config = replace(config, method="full", learning_rate=1e-2, epochs=4.0)
    for name, weights in (("plain", None), ("weighted", "balanced")):
        result = train_run(replace(config, class_weights=weights), tmp_path / name)  # type: ignore[arg-type]
        assert result.per_class is not None
        recall.append(result.per_class["good"]["recall"])
    assert recall[0] < recall[1], recall


def test_what_has_no_classes_is_refused(config: RunConfig, tmp_path: Path) -> None:
    file = tmp_path / "numbers.jsonl"
    file.write_text("".join(json.dumps({"text": "a cat", "label": i / 7}) + "\n" for i in range(30)))
    numbers = replace(config, train=str(file), eval=str(file), class_weights="balanced")
    with pytest.raises(ConfigError, match="class_weights needs one class per example, got regression"):
        train_run(numbers, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="weighs the data's labels"):
        replace(config, class_weights="balanced", fisher_labels="sampled")
