"""``childtuning.load``: runs and ChildTrainer's folders from Python, with plain strings."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import childtuning
from childtuning import ChildConfig
from childtuning.errors import ConfigError, DataError, ModelError
from childtuning.runs import FinishedRun, RunConfig, train_run
from childtuning.training import ChildTrainer

TEXTS = ["a great film", "awful food", "the dog sat on the mat"]


@pytest.fixture(scope="module")
def run(tiny_bert: Path, sentiment: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    files = {"train": str(sentiment / "train.jsonl"), "eval": str(sentiment / "dev.jsonl")}
    config = RunConfig(**files, model=str(tiny_bert), learning_rate=1e-2, batch_size=8)
    folder = tmp_path_factory.mktemp("loaded") / "run"
    train_run(config, folder)
    return childtuning.load(folder)


def test_plain_strings_and_files_are_predicted(run: FinishedRun, sentiment: Path, tmp_path: Path) -> None:
    rows = run.predict(TEXTS)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert rows == run.predict(tmp_path / "texts.jsonl") == run.predict(str(tmp_path / "texts.jsonl"))
    chances = run.predict_proba(TEXTS)
    assert chances.shape == (3, 2) and np.allclose(chances.sum(1), 1)
    assert [run.label_names[i] for i in chances.argmax(1)] == [row["prediction"] for row in rows]
    assert chances.max(1) == pytest.approx([row["confidence"] for row in rows])
    assert run.predict([]) == [] and run.predict_proba([]).shape == (0, 2)
    assert run.model() is run.model(), "the model is loaded once"
    assert run.evaluate(sentiment / "dev.jsonl") == pytest.approx(run.metrics["metrics"])


@pytest.mark.parametrize(
    ("examples", "words"),
    [
        ("a great film", r"there is no file 'a great film'. Pass a list for texts: \[text\]"),
        ([("a film", "a book")], "trained on single texts, got pairs of texts"),
        (["a film", 3], "all texts or all pairs of texts, got 3"),
        ([("a", "b", "c")], "all texts or all pairs"),
    ],
)
def test_what_is_no_example_is_refused(run: FinishedRun, examples: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        run.predict(examples)


def test_numbers_have_no_probabilities(tiny_bert: Path, tmp_path: Path) -> None:
    rows = [{"text": "a film", "text2": "a book", "label": i / 10} for i in range(40)]
    (tmp_path / "n.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"train": str(tmp_path / "n.jsonl"), "eval": str(tmp_path / "n.jsonl"), "text": "text"}
    config = RunConfig(**files, text_pair="text2", model=str(tiny_bert), method="head", epochs=1.0)
    train_run(config, tmp_path / "run")
    run = childtuning.load(tmp_path / "run")
    assert len(run.predict([("a film", "a book"), ("a dog", "a cat")])) == 2
    with pytest.raises(ConfigError, match="regression has no probability of each class. Call predict"):
        run.predict_proba([("a film", "a book")])


def test_a_run_is_merged(run: FinishedRun, tmp_path: Path) -> None:
    import transformers

    made = run.merge(tmp_path / "model")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(made)
    for name, p in run.model().named_parameters():
        assert torch.equal(p, model.get_parameter(name)), name
    with pytest.raises(ConfigError, match="is not an empty folder"):
        run.merge(made)


@pytest.fixture(scope="module")
def trained(
    tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, torch.Tensor], Path]:
    """The weights of a trainer's model, and the folder where it was saved."""
    from tests.training.test_child_trainer import a_trainer

    folder = tmp_path_factory.mktemp("trainer")
    trainer: ChildTrainer = a_trainer(tiny_bert, folder, ChildConfig(density=0.1), max_steps=2)
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    return {n: p.detach().clone() for n, p in trainer.bare_model.named_parameters()}, folder / "saved"


def test_a_trainers_folder_is_opened(
    trained: tuple[dict[str, torch.Tensor], Path], tiny_bert: Path, tmp_path: Path
) -> None:
    weights, folder = trained
    run = childtuning.load(folder)
    assert run.about["base_name"] == str(tiny_bert.resolve()) and run.kind.name == "classification"
    for name, parameter in run.model().named_parameters():
        assert torch.equal(parameter, weights[name]), name
    assert run.verify()["changed_outside"] == 0 < run.verify()["changed_inside"]
    with pytest.raises(ConfigError, match=r"has no tokenizer or image processor. Save it there"):
        run.predict(TEXTS)
    assert run.method == "child-d" and run.metrics["density"] == pytest.approx(0.1, abs=1e-3)

    import transformers

    transformers.AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    said: list[str] = []
    whole = childtuning.load(folder, tell=said.append)
    assert {row["prediction"] for row in whole.predict(TEXTS)} <= {"LABEL_0", "LABEL_1"}
    assert any("Set model.config.id2label before training" in line for line in said)
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(whole.merge(tmp_path / "model"))
    assert all(torch.equal(p, weights[n]) for n, p in merged.named_parameters())


def test_a_base_model_can_be_given(
    trained: tuple[dict[str, torch.Tensor], Path], tiny_bert: Path, run: FinishedRun
) -> None:
    from transformers import BertForSequenceClassification

    weights, folder = trained
    base = BertForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    model = childtuning.load(folder, model=base).model()
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters()), (
        "the given model is not changed"
    )
    with pytest.raises(ConfigError, match="model must be a folder or a hub name, got Bert"):
        childtuning.load(run.path, model=base)


def test_a_run_in_bf16_is_measured_as_it_will_be_served(
    tiny_bert: Path, sentiment: Path, tmp_path: Path
) -> None:
    files = {"train": str(sentiment / "train.jsonl"), "eval": str(sentiment / "dev.jsonl")}
    config = RunConfig(**files, model=str(tiny_bert), precision="bf16", learning_rate=1e-2, batch_size=8)
    result = train_run(
        replace(config, metric="log-loss", held_out=0.2, temperature_scaling=True), tmp_path / "run"
    )
    again = childtuning.load(tmp_path / "run")
    assert again.evaluate(sentiment / "dev.jsonl") == result.metrics


def test_examples_that_were_trained_on_are_told(run: FinishedRun, sentiment: Path, tmp_path: Path) -> None:
    trained, new = ((sentiment / name).read_text(encoding="utf-8") for name in ("train.jsonl", "dev.jsonl"))
    (tmp_path / "some.jsonl").write_text("".join(trained.splitlines(True)[:5]) + new, encoding="utf-8")
    told: list[str] = []
    again = childtuning.load(run.path, tell=told.append)
    again.evaluate(tmp_path / "some.jsonl")
    assert "warning: 5 of the 29 examples were trained on" in "".join(told)
    told.clear()
    again.evaluate(sentiment / "dev.jsonl")
    again.predict(sentiment / "train.jsonl")
    assert told == []


def test_a_task_whose_files_are_gone_is_not_looked_for_elsewhere(
    run: FinishedRun, sentiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import childtuning.runs.predict as module

    def read(*_: Any) -> Any:
        raise AssertionError("it asks the hub where the folder is gone")

    monkeypatch.setattr(module, "read_run_task", read)
    config = replace(run.config, train=None, eval=None, task="rte", data_dir=str(tmp_path))
    again = childtuning.load(run.path)
    monkeypatch.setattr(again, "config", config)
    again.evaluate(sentiment / "dev.jsonl")
    (tmp_path / "rte").mkdir()
    with pytest.raises(AssertionError, match="asks the hub"):
        again.evaluate(sentiment / "dev.jsonl")


def test_confidences_are_the_probabilities(run: FinishedRun) -> None:
    rows, chances = run.predict(TEXTS), run.predict_proba(TEXTS)
    assert [row["confidence"] for row in rows] == chances.max(1).tolist()


def test_a_base_that_has_moved_is_named_anew(tiny_bert: Path, sentiment: Path, tmp_path: Path) -> None:
    files = {"train": str(sentiment / "train.jsonl"), "eval": str(sentiment / "dev.jsonl")}
    shutil.copytree(tiny_bert, tmp_path / "base")
    train_run(RunConfig(**files, model=str(tmp_path / "base"), epochs=0.1), tmp_path / "run")
    wanted = childtuning.load(tmp_path / "run").predict(TEXTS)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(
        ModelError, match=r"base' is gone. Put it back, or open .*load\('.*run', model=FOLDER\)"
    ):
        childtuning.load(tmp_path / "run").predict(TEXTS)
    assert childtuning.load(tmp_path / "run", model=str(tmp_path / "moved")).predict(TEXTS) == wanted


def test_a_table_is_not_taken_for_its_columns_names(run: FinishedRun) -> None:
    class Table:  # as pandas' DataFrame
        columns = ("text", "id")

        def __iter__(self) -> Any:
            return iter(self.columns)

    for wrong in (Table(), {"text": TEXTS}):
        with pytest.raises(DataError, match="got a table. Pass one column"):
            run.predict(wrong)  # type: ignore[arg-type]
