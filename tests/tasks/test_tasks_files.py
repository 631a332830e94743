"""Columns, labels and tasks from the user's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from childtuning.errors import ConfigError, DataError
from childtuning.tasks.delimited import BadRow
from childtuning.tasks.files import read_examples, task_from_files
from childtuning.tasks.labels import class_name, convert_label, infer_label_kind, number_of, sort_labels


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_labels(path: Path, labels: list[Any]) -> Path:
    return write_jsonl(path, [{"text": f"row {i}", "label": label} for i, label in enumerate(labels)])


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([0, 1, 1], "class"),
        (["0", "1", "20"], "class"),
        ([0.0, 1.0, 2.0], "class"),
        ([0, 0.5], "number"),
        (["1", "2.5", "-3e1"], "number"),
        (list(range(20)), "class"),
        (list(range(21)), "number"),
        ([str(i) for i in range(21)], "number"),
        (["1", "2.5", "x"], "class"),
        ([True, False], "class"),
        (["1_0", "0.5"], "class"),
        ([f"{i:03}" for i in range(30)], "class"),
        (["0", "0.5", "0e1"], "number"),
        ([], "class"),
    ],
)
def test_label_kind_is_inferred(values, kind):
    assert infer_label_kind(values) == kind


def test_one_spelling_a_class():
    assert {class_name(value) for value in (1, 1.0, "1", "1.0", " 1 ")} == {"1"}
    assert [class_name(value) for value in (True, "True", "FALSE", False)] == [
        "true",
        "true",
        "false",
        "false",
    ]
    assert [class_name(value) for value in ("-2.00", "01", "v1.0", 0.5)] == ["-2", "01", "v1.0", "0.5"]
    assert number_of(10**400) is None and number_of(None) is None


def test_labels_sort_by_value_where_they_are_integers():
    assert sort_labels(["10", "2", "1", "2"]) == ("1", "2", "10")
    assert sort_labels(["b", "10", "2"]) == ("10", "2", "b")


@pytest.mark.parametrize("missing", [None, "", "  ", float("nan")])
def test_row_without_label(missing):
    with pytest.raises(BadRow, match="has no label in column 'c'"):
        convert_label(missing, "class", "c")


@pytest.mark.parametrize("value", ["x", "inf"])
def test_row_without_number(value):
    with pytest.raises(BadRow, match=f"must have a finite number in column 'c', got '{value}'"):
        convert_label(value, "number", "c")


def test_texts_become_strings(tmp_path):
    rows = [{"text": value, "label": "x"} for value in ("a", None, 3, 2.5, True, "half \ud800 pair")]
    path = write_jsonl(tmp_path / "a.jsonl", [*rows, {"label": "x"}])
    examples = read_examples(path)
    assert examples.text == ["a", "", "3", "2.5", "true", "half ? pair", ""]
    assert examples.num_empty == 2
    with pytest.raises(DataError, match="line 1 must have text in column 'text', got list"):
        read_examples(write_jsonl(path, [{"text": ["a"], "label": "x"}]))


def test_named_columns_pairs_and_unlabelled(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": "one", "a": "two", "text": "three", "y": 1}])
    examples = read_examples(path, text="q", text_pair="a", label="y")
    assert (examples.text, examples.text_pair, examples.labels) == (["one"], ["two"], ["1"])
    assert read_examples(path, label=None).labels is None
    assert read_examples(path, text_pair="a", label=None).text_pair == ["two"]
    assert read_examples(path, text="q", label=None).text_pair is None
    assert read_examples(path, label="y", label_kind="number").labels == [1.0]


def test_unknown_columns_are_named(tmp_path):
    path = write_labels(tmp_path / "a.jsonl", ["x"])
    with pytest.raises(DataError, match=r"no column 'lable'. Did you mean 'label'\? Known: text, label"):
        read_examples(path, label="lable")
    with pytest.raises(DataError, match="no column 'body'"):
        read_examples(path, text="body")
    with pytest.raises(DataError, match="text and label at once"):
        read_examples(path, text="label")


def test_label_of_a_nested_type(tmp_path):
    with pytest.raises(DataError, match="line 1 has a label of type list"):
        read_examples(write_labels(tmp_path / "a.jsonl", [["x"]]))


def test_classes_agree_across_types(tmp_path):
    train = tmp_path / "train.csv"
    train.write_text("text,label\na,1\nb,0\nc,10\n")
    task = task_from_files(train, write_labels(tmp_path / "dev.jsonl", [1.0, 10, "0"]))
    assert task.label_names == ("0", "1", "10")
    assert task.dev.labels == ["1", "10", "0"]
    assert (task.name, task.kind, task.metrics) == ("files", "classification", ("accuracy",))


def test_dev_follows_the_kind_of_train(tmp_path):
    train = write_labels(tmp_path / "train.jsonl", [0.5, 1.0, 2])
    dev = write_labels(tmp_path / "dev.jsonl", [1, 2])
    task = task_from_files(train, dev)
    assert (task.kind, task.metrics, task.dev.labels) == ("regression", ("pearson", "spearman"), [1.0, 2.0])
    assert task_from_files(train, dev, metric="spearman").metrics == ("spearman", "pearson")
    with pytest.raises(
        DataError, match="never saw in the dev split of 'files': '3'.*Correct or drop those rows"
    ):
        task_from_files(train, write_labels(dev, [3, 0.5]), label_type="class")
    with pytest.raises(DataError, match="No label is known: write the classes as the training set does"):
        task_from_files(train, write_labels(dev, ["low", "high"]), label_type="class")
    with pytest.raises(DataError, match="line 2 must have a finite number"):
        task_from_files(train, write_labels(dev, [1, "high", "low"]))


def test_label_type_can_be_forced(tmp_path):
    path = write_labels(tmp_path / "a.jsonl", [0, 1, 2])
    assert task_from_files(path, path, label_type="number").kind == "regression"
    assert task_from_files(path, path).kind == "classification"
    with pytest.raises(ConfigError, match="Did you mean 'number'"):
        task_from_files(path, path, label_type="numbers")  # type: ignore[arg-type]


def test_metrics_are_checked(tmp_path):
    path = write_labels(tmp_path / "a.jsonl", ["x", "y"])
    assert task_from_files(path, path, metric="f1").metrics == ("f1", "accuracy")
    with pytest.raises(ConfigError, match="Did you mean 'accuracy'"):
        task_from_files(path, path, metric="acuracy")
    with pytest.raises(ConfigError, match=r"'pearson' does not fit classification\. Pass one of accuracy"):
        task_from_files(path, path, metric="pearson")


def test_train_limit(tmp_path):
    path = write_labels(tmp_path / "a.jsonl", ["x", "y"] * 20)
    task = task_from_files(path, path, train_limit=10, seed=1)
    assert len(task.train) == 10 and len(task.dev) == 40


def test_the_kind_can_be_forced(tmp_path):
    path = write_labels(tmp_path / "a.jsonl", [0.5, 1, 2])
    assert task_from_files(path, path, kind="classification").label_names == ("0.5", "1", "2")
    assert task_from_files(write_labels(path, [0, 1]), path, kind="regression").kind == "regression"
    with pytest.raises(ConfigError, match="labels of type 'class', got label_type 'number'"):
        task_from_files(path, path, kind="classification", label_type="number")
    with pytest.raises(DataError, match="got 'regresion'. Did you mean 'regression'"):
        task_from_files(path, path, kind="regresion")


def test_a_file_of_two_kinds_asks_which(tmp_path):
    row = {"tokens": ["a", "b"], "tags": ["X", "Y"], "prompt": "a", "response": "b"}
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(ConfigError, match="--task-kind"):
        task_from_files(path, path)
    assert task_from_files(path, path, kind="causal-lm").kind == "causal-lm"


@pytest.mark.parametrize("label", ["", "nan", "NaN", "<NA>", None, float("nan")])
def test_labels_that_are_missing(tmp_path: Path, label: Any) -> None:
    path = write_labels(tmp_path / "a.jsonl", ["x", "y", label])
    with pytest.raises(DataError, match="line 3 has no label"):
        task_from_files(path, path, strict=True)
    task = task_from_files(path, path)
    assert len(task.train) == 2 and len(task.notes) == 1
    assert "1 of 3 rows of a.jsonl were left out: line 3 has no label in column 'label'" in task.notes[0]


def test_labels_that_are_odd(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "\\ud83d"}\n')
    assert task_from_files(tmp_path / "a.jsonl", tmp_path / "a.jsonl").label_names == ("?", "x")
    path = write_labels(tmp_path / "b.jsonl", [f"{number},5" for number in range(30)])
    assert task_from_files(path, path).train.labels == [number + 0.5 for number in range(30)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("word", ["NA", "None", "null", "N/A"])
def test_words_for_nothing_beside_numbers(tmp_path: Path, word: str) -> None:
    path = write_labels(tmp_path / "a.jsonl", ["1.5", "2.0", "2.5", word])
    with pytest.raises(DataError, match=f"line 4 must have a finite number in column 'label', got '{word}'"):
        task_from_files(path, path, strict=True)
    classes = write_labels(tmp_path / "b.jsonl", ["x", word, "y"])  # a class may be called so
    assert word in task_from_files(classes, classes).label_names
    grades = write_labels(tmp_path / "c.jsonl", [word, "1", "2"])
    assert word in task_from_files(grades, grades).label_names
    assert word in task_from_files(path, path, label_type="class").label_names


def test_numbers_with_decimal_commas(tmp_path: Path) -> None:
    rows = "".join(f"a text {i};{i},{i % 10}5\n" for i in range(30))
    (tmp_path / "a.csv").write_text("text;score\n" + rows, encoding="utf-8")
    task = task_from_files(tmp_path / "a.csv", label="score")
    assert task.kind == "regression" and "column 'score' is read with decimal commas" in "".join(task.notes)
    assert sorted([*task.train.labels, *task.dev.labels])[:3] == [0.05, 1.15, 2.25]  # type: ignore[attr-defined]
    (tmp_path / "b.csv").write_text("text;score\nx;1,125\ny;2,250\n", encoding="utf-8")
    both = task_from_files(tmp_path / "a.csv", tmp_path / "b.csv", label="score")
    assert both.dev.labels == [1.125, 2.25]  # type: ignore[attr-defined]  # as in training
    (tmp_path / "a.csv").write_text("text;score\n" + rows.replace(",55", ".55"), encoding="utf-8")
    with pytest.raises(DataError, match="must have a finite number in column 'score', got '0,05'"):
        task_from_files(tmp_path / "a.csv", label="score")  # which of the two marks decimals is not known
