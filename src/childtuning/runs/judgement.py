"""How good a model's answers are: metrics with an interval, each class, and the most confident errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from childtuning.tasks import Kind, Split
from childtuning.tasks.metrics import interval, probabilities, score

_NUM_ERRORS = 5
_MOST_CLASSES = 50  # a larger confusion matrix is left out


@dataclass(frozen=True)
class Judgement:
    """Answers compared with the labels.

    Attributes:
        metrics: name -> value; the first is the main metric.
        interval: both ends of a 95% bootstrap interval of the main metric over the examples; ``None`` without a value.
        per_class: class -> its precision, recall, f1 and support; ``None`` unless each example has one class.
        confusion: how often each class (row) got each answer (column), in the order of ``per_class``; ``None`` also
            with more than 50 classes.
        errors: the wrong answers with the highest probability, at most five: text, label, prediction, confidence.
    """

    metrics: dict[str, float]
    interval: list[float] | None = None
    per_class: dict[str, dict[str, float]] | None = None
    confusion: list[list[int]] | None = None
    errors: list[dict[str, Any]] = field(default_factory=list)


def judge(
    kind: Kind,
    metrics: Sequence[str],
    outputs: Sequence[Any],
    encoded: Any,
    split: Split,
    label_names: Sequence[str],
) -> Judgement:
    """Compare a model's outputs with the labels of the examples; arguments as for ``Kind.measure``."""
    found = [kind.weighted(name, outputs, encoded, split, label_names) for name in metrics]
    values = {name: score(fn, len(outputs)) for name, fn in zip(metrics, found, strict=True)}
    ends = interval(found[0], len(outputs))
    around = None if ends is None else list(ends)
    truth = kind.truth(split, label_names)
    if truth is None or not np.isfinite(outputs).all():
        return Judgement(values, around)
    chances = probabilities(outputs)
    said = chances.argmax(1)
    return Judgement(
        values,
        around,
        _per_class(np.asarray(truth), said, label_names),
        _confusion(np.asarray(truth), said, len(label_names)) if len(label_names) <= _MOST_CLASSES else None,
        _errors(np.asarray(truth), said, chances, split, label_names),
    )


def _per_class(
    truth: np.ndarray, said: np.ndarray, label_names: Sequence[str]
) -> dict[str, dict[str, float]]:
    from sklearn.metrics import precision_recall_fscore_support

    names = ("precision", "recall", "f1", "support")
    ids = list(range(len(label_names)))
    columns = precision_recall_fscore_support(truth, said, labels=ids, zero_division=0)  # type: ignore[arg-type]
    rows = zip(*(np.asarray(column).tolist() for column in columns), strict=True)
    return {label: dict(zip(names, row, strict=True)) for label, row in zip(label_names, rows, strict=True)}


def _confusion(truth: np.ndarray, said: np.ndarray, num_classes: int) -> list[list[int]]:
    counts = np.bincount(truth * num_classes + said, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes).tolist()


def _errors(
    truth: np.ndarray, said: np.ndarray, chances: np.ndarray, split: Split, label_names: Sequence[str]
) -> list[dict[str, Any]]:
    wrong = np.flatnonzero(said != truth)
    confidence = chances[wrong, said[wrong]]
    worst = np.argsort(-confidence, kind="stable")[:_NUM_ERRORS]
    return [
        {
            "text": split.shown(int(row)),
            "label": label_names[int(truth[row])],
            "prediction": label_names[int(said[row])],
            "confidence": float(chances[row, said[row]]),
        }
        for row in wrong[worst]
    ]
