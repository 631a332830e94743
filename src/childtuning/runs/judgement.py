"""How good a model's answers are: metrics with an interval, each class, and the most confident errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from childtuning.tasks import Kind, Split
from childtuning.tasks.metrics import WeightedFn, interval, probabilities, score, share_interval

_NUM_ERRORS = 5
_MOST_CLASSES = 50  # a larger confusion matrix is left out
_MOST_ANSWERS = 2000


@dataclass(frozen=True)
class Judgement:
    """Answers compared with the labels.

    Attributes:
        metrics: name -> value; the first is the main metric.
        interval: both ends of a 95% interval of the main metric over the examples: Wilson's for the accuracy of one
            class an example, a bootstrap's for other metrics; ``None`` without a value, and where the
            samples do not differ, as when all answers are right.
        per_class: class -> its precision, recall, f1 and support; ``None`` unless each example has one class.
        confusion: how often each class (row) got each answer (column), in the order of ``per_class``; ``None`` also
            with more than 50 classes.
        errors: the wrong answers with the highest probability, at most five: text, label, prediction, confidence.
        answers: the class that each example got; ``None`` unless each has one class, with more than 2,000 examples,
            and in cross-validation.
    """

    metrics: dict[str, float]
    interval: list[float] | None = None
    per_class: dict[str, dict[str, float]] | None = None
    confusion: list[list[int]] | None = None
    errors: list[dict[str, Any]] = field(default_factory=list)
    answers: list[str] | None = None


class Answered(NamedTuple):
    """What a model returned for labelled examples.

    Attributes:
        outputs: as ``Kind.outputs`` returns them, one per example.
        encoded: the examples as model inputs.
        split: the examples.
    """

    outputs: Sequence[Any]
    encoded: Any
    split: Split


def judge(
    kind: Kind, metrics: Sequence[str], parts: Sequence[Answered], label_names: Sequence[str]
) -> Judgement:
    """Compare outputs with the labels of the examples.

    Args:
        kind: the kind of task.
        metrics: their names; the first is the main metric.
        parts: what was returned; with several parts, as in cross-validation, a metric is the mean over them,
            weighted by their examples.
        label_names: class names in order of id.
    """
    num = sum(len(part.outputs) for part in parts)
    found = [_joined([_weighted(kind, name, part, label_names) for part in parts]) for name in metrics]
    values = {name: score(fn, num) for name, fn in zip(metrics, found, strict=True)}
    truths = [kind.truth(part.split, label_names) for part in parts]
    is_share = metrics[0] == "accuracy" and truths[0] is not None
    ends = share_interval(values["accuracy"], num) if is_share else interval(found[0], num)
    around = None if ends is None else list(ends)
    if truths[0] is None or not all(np.isfinite(part.outputs).all() for part in parts):
        return Judgement(values, around)
    truth = np.concatenate([np.asarray(ids) for ids in truths])
    chances = probabilities(np.concatenate([np.stack(part.outputs) for part in parts]))
    said = chances.argmax(1)
    shown = [partial(part.split.shown, row) for part in parts for row in range(len(part.outputs))]
    return Judgement(
        values,
        around,
        _per_class(truth, said, label_names),
        _confusion(truth, said, len(label_names)) if len(label_names) <= _MOST_CLASSES else None,
        _errors(truth, said, chances, shown, label_names),
        [str(label_names[answer]) for answer in said] if num <= _MOST_ANSWERS and len(parts) == 1 else None,
    )


def measure(
    kind: Kind, metrics: Sequence[str], parts: Sequence[Answered], label_names: Sequence[str]
) -> dict[str, float]:
    """Return the metrics alone; arguments as for ``judge``."""
    num = sum(len(part.outputs) for part in parts)
    return {
        name: score(_joined([_weighted(kind, name, part, label_names) for part in parts]), num)
        for name in metrics
    }


def _weighted(kind: Kind, name: str, part: Answered, label_names: Sequence[str]) -> tuple[WeightedFn, int]:
    return kind.weighted(name, *part, label_names), len(part.outputs)


def _joined(parts: Sequence[tuple[WeightedFn, int]]) -> WeightedFn:
    """Return the mean of a metric over parts, weighted by the weights of their examples."""
    if len(parts) == 1:
        return parts[0][0]
    ends = np.cumsum([size for _, size in parts])[:-1]

    def weighted(weights: np.ndarray) -> np.ndarray:
        total = np.zeros(len(weights))
        for (fn, _), part in zip(parts, np.split(weights, ends, axis=1), strict=True):
            sums = part.sum(1)
            there = sums > 0  # a bootstrap may leave a small part without examples
            total[there] += sums[there] * fn(part[there])
        return total / weights.sum(1)

    return weighted


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
    truth: np.ndarray,
    said: np.ndarray,
    chances: np.ndarray,
    shown: Sequence[Callable[[], str]],
    label_names: Sequence[str],
) -> list[dict[str, Any]]:
    wrong = np.flatnonzero(said != truth)
    confidence = chances[wrong, said[wrong]]
    worst = np.argsort(-confidence, kind="stable")[:_NUM_ERRORS]
    return [
        {
            "text": shown[row](),
            "label": label_names[int(truth[row])],
            "prediction": label_names[int(said[row])],
            "confidence": float(chances[row, said[row]]),
        }
        for row in wrong[worst]
    ]
