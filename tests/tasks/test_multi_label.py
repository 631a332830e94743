"""Texts with several labels: reading, batches, metrics, and the Fisher information of their loss."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.tasks.measured import measured

from childtuning import fisher_information
from childtuning.errors import DataError
from childtuning.tasks import LabelSets, Source, find_kind, task_from_files

KIND = find_kind("multi-label")
ROWS = [
    {"text": "the cat sat", "label": ["animal"]},
    {"text": "the dog ran in the house", "label": ["place", "animal", "animal"]},
    {"text": "it was nice", "label": []},
    {"text": "over the tree", "label": ["place", 7.0]},
]
NAMES = ("7", "animal", "place")


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_lists_of_labels_are_a_kind_of_their_own(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    task = task_from_files(path, path)
    assert (task.kind, task.label_names) == ("multi-label", NAMES)
    assert task.metrics == ("micro-f1", "macro-f1", "subset-accuracy")
    assert task.train.names == [["animal"], ["animal", "place"], [], ["7", "place"]]  # type: ignore[attr-defined]
    assert isinstance(task.train.sample(2), LabelSets)
    asked = KIND.read(Source(path), task.columns, labelled=False)
    assert asked.text == task.train.text and not asked.is_labelled  # type: ignore[attr-defined]
    words = write(tmp_path / "b.jsonl", [{"tokens": ["a", "b"], "tags": ["X", "Y"]}] * 2)
    assert task_from_files(words, words).kind == "token-classification"


@pytest.mark.parametrize(
    ("label", "got"), [(None, "nothing"), ("animal", "str"), ([["a"]], "list"), ([""], "list")]
)
def test_rows_without_a_list_are_bad(tmp_path, label, got):
    path = write(tmp_path / "a.jsonl", [*ROWS, {"text": "a", "label": label}])
    with pytest.raises(DataError, match=f"line 5 must have a list of labels in column 'label', got {got}"):
        task_from_files(path, path, strict=True)
    assert len(task_from_files(path, path).train) == 4


def test_rows_without_any_label_are_told(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"a {i}", "label": []} for i in range(8)])
    with pytest.raises(
        DataError, match="at least one label, got none in the train split.*Label the examples"
    ):
        task_from_files(path, path)


def test_one_label_is_enough(tmp_path):
    rows = [{"text": f"a {i}", "label": ["spam"] * (i % 2)} for i in range(8)]
    task = task_from_files(path := write(tmp_path / "a.jsonl", rows), path)
    assert (task.kind, task.label_names) == ("multi-label", ("spam",))
    assert KIND.num_outputs(task.label_names) == 1


def test_a_mean_over_labels_leaves_out_those_that_do_not_occur():
    split = LabelSets(["a", "b"], None, [["7"], ["7"]])  # type: ignore[arg-type]
    outputs = [np.array([2.0, -1.0, -1.0])] * 2
    assert measured(KIND, ["macro-f1"], outputs, None, split, NAMES) == {"macro-f1": 1.0}


def test_metrics_and_predictions():
    split = LabelSets(["a", "b"], None, [["7"], ["animal", "place"]])  # type: ignore[arg-type]
    outputs = [np.array([2.0, -1.0, -1.0]), np.array([-3.0, 0.0, -1.0])]
    values = measured(KIND, KIND.metric_names, outputs, None, split, NAMES)
    assert values == pytest.approx({"micro-f1": 0.8, "macro-f1": 2 / 3, "subset-accuracy": 0.5})
    first, second = KIND.predictions(outputs, None, split, NAMES)
    assert (second["prediction"], second["confidence"]) == (["animal"], [0.5])
    assert KIND.line(first, "a") == "7 0.881\ta"
    assert KIND.line({"prediction": [], "confidence": []}, "a") == "—\ta"
    assert np.isnan(
        list(measured(KIND, ["micro-f1"], [outputs[0], np.full(3, np.nan)], None, split, NAMES).values())
    ).all()
    assert KIND.constant_output(split, NAMES).tolist() == [1.0, 1.0, 1.0]
    assert KIND.constant_output(LabelSets(["a"] * 3, None, [["7"], [], []]), NAMES).tolist() == [-1.0] * 3  # type: ignore[arg-type]


def test_targets_are_floats_and_fisher_is_that_of_each_example(tmp_path, tiny_bert):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path = write(tmp_path / "a.jsonl", ROWS)
    task = task_from_files(path, path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    encoded = KIND.encode(tokenizer, task.train, max_length=16, label_names=NAMES)
    rows = [encoded[index] for index in range(4)]
    assert [row["labels"] for row in rows] == [[0.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0] * 3, [1.0, 0.0, 1.0]]
    batch = KIND.collator(tokenizer)(rows)
    assert batch["labels"].shape == (4, 3) and batch["labels"].dtype == torch.float32
    torch.manual_seed(0)
    options = KIND.model_options(NAMES)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, **options).eval()
    name = "classifier.weight"
    total = torch.zeros_like(model.classifier.weight)
    for row in rows:
        model.zero_grad()
        model(**KIND.collator(tokenizer)([row])).loss.backward()
        total += model.classifier.weight.grad**2 / 4
    scores = fisher_information(model, [batch], eligible=[name])
    torch.testing.assert_close(scores[name], total, rtol=1e-4, atol=1e-9)


def test_draws_keep_the_shares_of_rare_labels() -> None:
    names = [["common", "rare"] if i % 20 == 0 else ["common"] if i % 4 else [] for i in range(100)]
    rows = LabelSets([f"text {i}" for i in range(100)], None, names)
    for seed in range(5):
        train, dev = rows.hold_out(0.2, seed=seed)
        counts = [
            sum("rare" in one for one in side.names) for side in (train, dev, train.sample(40, seed=seed))
        ]
        assert counts == [4, 1, 2]
        assert [len(side) for side in (train, dev)] == [80, 20]
    assert LabelSets(["a"], None, None).strata() is None
