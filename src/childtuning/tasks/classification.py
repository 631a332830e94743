"""Text classification."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from childtuning.tasks.examples import Examples
from childtuning.tasks.kind import Columns, register
from childtuning.tasks.metrics import WeightedFn, default_metrics, metric_fn, metrics_of, probabilities
from childtuning.tasks.rows import Source
from childtuning.tasks.text import TextKind


@register
class Classification(TextKind):
    """One class per text or pair of texts, trained with cross entropy."""

    name = "classification"
    summary = "one class per text or pair of texts"
    problem_type = "single_label_classification"
    metric_names = metrics_of("classification")
    label_kind = "class"

    def claims(self, source: Source, columns: Columns) -> bool:
        """Return False: this is the default when no other kind claims a file."""
        return False

    def metrics(self, label_names: Sequence[str]) -> tuple[str, ...]:
        """Return accuracy."""
        return default_metrics("classification")

    def truth(self, split: Examples, label_names: Sequence[str]) -> list[int]:
        """Return the class id of each example."""
        return class_ids(split.labels or (), label_names)

    def weighted(
        self, metric: str, outputs: Sequence[Any], encoded: Any, split: Examples, label_names: Sequence[str]
    ) -> WeightedFn:
        """Compare the logits with the label."""
        return metric_fn(metric, likeliest(outputs), self.truth(split, label_names), logits=np.stack(outputs))

    def constant_output(self, train: Examples, label_names: Sequence[str]) -> np.ndarray:
        """Return logits of the classes' shares in training."""
        return class_shares(train.labels or (), label_names)

    def predictions(
        self, answers: Sequence[Any], encoded: Any, split: Examples, label_names: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Return the class, its softmax probability and the logits."""
        return class_predictions(answers, label_names)

    def chances(self, logits: np.ndarray) -> np.ndarray:
        """Return the softmax of each row."""
        return probabilities(logits)

    def line(self, prediction: Mapping[str, Any], shown: str) -> str:
        """Return the class, its probability and the text."""
        return class_line(prediction, shown)


def class_ids(labels: Iterable[Any], label_names: Sequence[str]) -> list[int]:
    """Return the ids of class names."""
    ids = {name: index for index, name in enumerate(label_names)}
    return [ids[str(label)] for label in labels]


def likeliest(logits: Sequence[Any]) -> np.ndarray:
    """Return the class with the largest logit for each example; all NaN if any logit is not finite."""
    rows = np.stack(logits)
    return rows.argmax(1) if np.isfinite(rows).all() else np.full(len(rows), np.nan)


def class_shares(labels: Iterable[Any], label_names: Sequence[str]) -> np.ndarray:
    """Return logits [num_labels], float32, whose probabilities are the shares of the classes."""
    counts = Counter(map(str, labels))
    return np.log([max(counts[name], 1e-9) for name in label_names]).astype(np.float32)


def class_predictions(logits: Sequence[Any], label_names: Sequence[str]) -> list[dict[str, Any]]:
    """Return for each example the most likely class, its softmax probability and the logits."""
    chances = probabilities(np.stack(logits)) if len(logits) else []
    return [
        {
            "prediction": label_names[int(row.argmax())],
            "confidence": float(chance[int(row.argmax())]),
            "logits": row.tolist(),
        }
        for row, chance in zip(logits, chances, strict=True)
    ]


def class_line(prediction: Mapping[str, Any], shown: str) -> str:
    """Return the class, its probability and the example."""
    return f"{prediction['prediction']}\t{prediction['confidence']:.3f}\t{shown}"
