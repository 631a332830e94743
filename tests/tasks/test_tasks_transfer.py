"""Examples of other tasks, under a mapping of labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from childtuning.errors import DataError
from childtuning.tasks import Examples, TransferTask, load_transfer_task

NLI = ("entailment", "neutral", "contradiction")


def elsewhere(*labels: str) -> TransferTask:
    texts = [str(index) for index in range(len(labels))]
    return TransferTask("other", Examples(texts, texts, list(labels)), frozenset(labels))


@pytest.mark.parametrize(
    ("truth", "predicted", "classes", "accuracy"),
    [
        (NLI, ("entailment", "contradiction", "contradiction"), NLI, 2 / 3),
        # SciTail has no contradiction: contradiction stands for neutral.
        (("entailment", "neutral", "neutral"), ("entailment", "contradiction", "entailment"), NLI, 2 / 3),
        # RTE's and QQP's two classes.
        (("entailment", "not_entailment", "not_entailment"), NLI, NLI, 1.0),
        (("duplicate", "not_duplicate", "duplicate"), ("entailment", "neutral", "contradiction"), NLI, 2 / 3),
        # A model of two classes on three.
        (NLI, ("entailment", "not_entailment", "entailment"), ("entailment", "not_entailment"), 2 / 3),
        (("yes", "no"), ("yes", "yes"), ("no", "yes"), 0.5),
    ],
)
def test_classes_are_compared_as_far_as_both_know_them(
    truth: tuple[str, ...], predicted: tuple[str, ...], classes: tuple[str, ...], accuracy: float
) -> None:
    assert elsewhere(*truth).accuracy(predicted, classes) == pytest.approx(accuracy)


def write(folder: Path, name: str, *labels: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"text1": "a", "text2": "b", "label": label} for label in labels]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_split_is_named_behind_the_task(tmp_path: Path) -> None:
    write(tmp_path / "snli", "dev.jsonl", "neutral")
    write(tmp_path / "snli", "test.jsonl", "entailment", "neutral")
    write(tmp_path / "mnli", "dev_matched.jsonl", "contradiction")
    write(tmp_path / "mnli", "dev_mismatched_1000.jsonl", "contradiction", "neutral", "neutral")
    found = [
        len(load_transfer_task(name, NLI, tmp_path).examples)
        for name in (
            "snli",
            "snli/test",
            "mnli",
            "mnli/dev_mismatched_1000",
        )
    ]
    assert found == [1, 2, 1, 3]


def test_what_cannot_be_mapped_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "topics", "dev.jsonl", "sport", "art")
    with pytest.raises(DataError, match="label 'art' has no counterpart"):
        load_transfer_task("topics", NLI, tmp_path)
    assert load_transfer_task("topics", ("art", "sport"), tmp_path)
    one = load_transfer_task("topics", ("art", "sport"), tmp_path, limit=1, seed=2)
    assert len(one.examples) == 1 and one.classes == {"art", "sport"}
    assert one.accuracy(one.examples.labels, ("art", "sport")) == 1.0
    with pytest.raises(DataError, match="needs a model with classes"):
        load_transfer_task("topics", (), tmp_path)
    with pytest.raises(DataError, match="Pass --data-dir"):
        load_transfer_task("topics", NLI, None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no split 'dev'"):
        load_transfer_task("empty", NLI, tmp_path)
