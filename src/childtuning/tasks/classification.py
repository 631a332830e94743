"""Texts with classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from childtuning.tasks.examples import Examples
from childtuning.tasks.kind import Columns, register
from childtuning.tasks.metrics import compute_metrics, default_metrics, metrics_of
from childtuning.tasks.rows import Source
from childtuning.tasks.text import TextKind


@register
class Classification(TextKind):
    """One class a text or pair of texts, by cross entropy."""

    name = "classification"
    summary = "one class a text, or a pair of texts"
    metric_names = metrics_of("classification")
    label_kind = "class"

    def claims(self, source: Source, columns: Columns) -> bool:
        """Nothing by itself: it is what is left when no other kind claims a file."""
        return False

    def metrics(self, label_names: Sequence[str]) -> tuple[str, ...]:
        """Return accuracy."""
        return default_metrics("classification")

    def model_options(self, label_names: Sequence[str]) -> dict[str, Any]:
        """Return class names, and that each text has one of them."""
        return {**super().model_options(label_names), "problem_type": "single_label_classification"}

    def measure(
        self,
        metrics: Sequence[str],
        outputs: Sequence[Any],
        encoded: Any,
        split: Examples,
        label_names: Sequence[str],
    ) -> dict[str, float]:
        """Compare the likeliest class with the label."""
        ids = {name: index for index, name in enumerate(label_names)}
        truth = [ids[str(label)] for label in split.labels or ()]
        return compute_metrics(metrics, likeliest(outputs), truth)

    def constant_output(self, train: Examples, label_names: Sequence[str]) -> np.ndarray:
        """Return logits of the most frequent class."""
        return most_frequent(train.labels or (), label_names)

    def predictions(
        self, answers: Sequence[Any], encoded: Any, split: Examples, label_names: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Return class, softmax probability and logits."""
        return class_predictions(answers, label_names)

    def line(self, prediction: Mapping[str, Any], shown: str) -> str:
        """Return class, probability and text."""
        return class_line(prediction, shown)


def likeliest(logits: Sequence[Any]) -> np.ndarray:
    """Return the class of the largest logit by example; NaN for all where a logit is not finite."""
    rows = np.stack(logits)
    return rows.argmax(1) if np.isfinite(rows).all() else np.full(len(rows), np.nan)


def most_frequent(labels: Iterable[Any], label_names: Sequence[str]) -> np.ndarray:
    """Return logits [num_labels], float32, of the class that most labels name; of equals, the first by id."""
    counts = Counter(map(str, labels))
    best = max(label_names, key=lambda name: counts[name])
    return np.asarray([float(name == best) for name in label_names], dtype=np.float32)


def class_predictions(logits: Sequence[Any], label_names: Sequence[str]) -> list[dict[str, Any]]:
    """Return by example the likeliest class, its softmax probability and the logits."""
    rows = []
    for row in logits:
        best = int(row.argmax())
        confidence = float(torch.from_numpy(row).softmax(0)[best])
        rows.append({"prediction": label_names[best], "confidence": confidence, "logits": row.tolist()})
    return rows


def class_line(prediction: Mapping[str, Any], shown: str) -> str:
    """Return class, probability and example."""
    return f"{prediction['prediction']}\t{prediction['confidence']:.3f}\t{shown}"
