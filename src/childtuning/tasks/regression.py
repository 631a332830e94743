"""Text regression."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from childtuning.errors import DataError
from childtuning.tasks.columns import find_label, find_text
from childtuning.tasks.examples import Examples
from childtuning.tasks.kind import Columns, register
from childtuning.tasks.labels import infer_label_kind
from childtuning.tasks.metrics import WeightedFn, default_metrics, metric_fn, metrics_of
from childtuning.tasks.rows import Source
from childtuning.tasks.text import TextKind

if TYPE_CHECKING:
    from childtuning.tasks.kind import Task


@register
class Regression(TextKind):
    """One number per text or pair of texts, trained with squared error."""

    name = "regression"
    summary = "one number per text or pair of texts"
    has_classes = False
    problem_type = "regression"
    metric_names = metrics_of("regression")
    label_kind = "number"

    def claims(self, source: Source, columns: Columns) -> bool:
        """Accept table files whose labels are numbers to predict, or are declared as such."""
        if columns.label_type == "class" or not source.is_table:
            return False
        if columns.label_type == "number":
            return True
        text, pair = (columns.text, columns.text_pair) if columns.text else find_text(source) or (None, None)
        label = columns.label or find_label(source, text, pair)
        return label is not None and infer_label_kind(source.cells(label)) == "number"

    def metrics(self, label_names: Sequence[str]) -> tuple[str, ...]:
        """Return the correlations."""
        return default_metrics("regression")

    def check(self, task: Task) -> None:
        """Refuse targets that are not finite numbers."""
        super().check(task)
        for split, rows in (("train", task.train), ("dev", task.dev)):
            assert isinstance(rows, Examples)
            for row, target in enumerate(rows.labels or (), start=1):
                if isinstance(target, str) or not math.isfinite(target):
                    raise DataError(
                        f"Regression labels must be finite numbers, got {target!r} in row {row} "
                        f"of the {split} split of {task.name!r}. Correct or drop that row."
                    )

    def num_outputs(self, label_names: Sequence[str]) -> int:
        """Return 1."""
        return 1

    def model_options(self, label_names: Sequence[str]) -> dict[str, Any]:
        """Return the options for one output, trained with squared error."""
        return {"num_labels": 1, "problem_type": self.problem_type}

    def weighted(
        self, metric: str, outputs: Sequence[Any], encoded: Any, split: Examples, label_names: Sequence[str]
    ) -> WeightedFn:
        """Compare outputs with targets."""
        return metric_fn(metric, np.stack(outputs)[:, 0], np.asarray(split.labels))

    def constant_output(self, train: Examples, label_names: Sequence[str]) -> np.ndarray:
        """Return the mean target; its correlation is 0, as for any constant."""
        return np.asarray([np.mean([float(label) for label in train.labels or ()])], dtype=np.float32)

    def predictions(
        self, answers: Sequence[Any], encoded: Any, split: Examples, label_names: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Return the numbers."""
        return [{"prediction": float(row[0]), "logits": row.tolist()} for row in answers]

    def line(self, prediction: Mapping[str, Any], shown: str) -> str:
        """Return the number and the text."""
        return f"{prediction['prediction']:.4f}\t{shown}"
