"""Text classification with several labels per text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from childtuning.errors import DataError
from childtuning.tasks.batches import EncodedExamples, encode
from childtuning.tasks.columns import find_label, find_text, text_of
from childtuning.tasks.delimited import BadRow
from childtuning.tasks.examples import Examples
from childtuning.tasks.kind import Columns, Part, Task, register
from childtuning.tasks.labels import class_name, is_missing
from childtuning.tasks.metrics import WeightedFn, ratio
from childtuning.tasks.rows import Source
from childtuning.tasks.text import TextKind


class LabelSets(Examples):
    """Texts, each with any number of labels: `labels` holds a list of class names per text."""

    @property
    def names(self) -> list[list[str]]:
        """The labels of each text; [] for unlabelled texts."""
        return cast("list[list[str]]", self.labels or [])

    def classes(self) -> set[str]:
        """Return the labels that occur."""
        return {name for names in self.names for name in names}

    def strata(self) -> list[str] | None:
        """Return the rarest label of each text, "" where it has none, so that draws keep the shares of rare labels."""
        counts = Counter(name for names in self.names for name in names)
        return [min(names, key=lambda name: (counts[name], name), default="") for names in self.names] or None


@register
class MultiLabel(TextKind):
    """Any number of labels per text or pair of texts, trained with binary cross entropy.

    A label is predicted if its probability, the sigmoid of its logit, is 0.5 or more.
    """

    name = "multi-label"
    summary = "any number of labels per text or pair of texts: rows with a list of labels"
    problem_type = "multi_label_classification"
    metric_names = ("micro-f1", "macro-f1", "subset-accuracy")
    label_kind = "class"

    def claims(self, source: Source, columns: Columns) -> bool:
        """Accept tables of texts whose labels are lists."""
        if not source.is_table:
            return False
        text, pair = (columns.text, columns.text_pair) if columns.text else find_text(source) or (None, None)
        label = columns.label or find_label(source, text, pair)
        if text is None or label is None:
            return False
        has_texts = any(isinstance(cell, str) for cell in source.cells(text))
        return has_texts and any(_is_list(cell) for cell in source.cells(label))

    def read(
        self, source: Source, columns: Columns, *, part: Part = "dev", labelled: bool = True
    ) -> LabelSets:
        """Read texts and lists of labels from a table file; a list may be empty."""
        text, pair, label = columns.text, columns.text_pair, columns.label

        def read(*cells: Any) -> tuple[str, str, list[str]]:
            names = _names(cells[2], label) if labelled else []
            return text_of(cells[0], text), text_of(cells[1], pair), names

        rows = source.each(read, text, pair, label if labelled else None)
        return LabelSets(
            text=[first for first, _, _ in rows],
            text_pair=None if pair is None else [second for _, second, _ in rows],
            labels=[names for _, _, names in rows] if labelled else None,  # type: ignore[arg-type]
        )

    def of_texts(self, texts: list[str], pairs: list[str] | None, columns: Columns) -> LabelSets:
        """Return texts or pairs."""
        return LabelSets(texts, pairs, None)

    def check(self, task: Task) -> None:
        """Refuse texts that do not have lists of labels."""
        super().check(task)
        if not (isinstance(task.train, LabelSets) and isinstance(task.dev, LabelSets)):
            raise DataError(f"The splits of {task.name!r} must hold lists of labels. Pass LabelSets.")

    def metrics(self, label_names: Sequence[str]) -> tuple[str, ...]:
        """Return F1 over all labels, its mean over labels, and the share of texts with all labels right."""
        return self.metric_names

    def encode(
        self, processor: Any, split: LabelSets, *, max_length: int, label_names: Sequence[str] = ()
    ) -> EncodedExamples:
        """Tokenise texts; labels are 1.0 for each label of a text and 0.0 for the others."""
        unlabelled = Examples(split.text, split.text_pair)
        targets = None if split.labels is None else _indicators(split, label_names).tolist()
        return encode(processor, unlabelled, max_length=max_length).with_labels(targets)

    def weighted(
        self, metric: str, outputs: Sequence[Any], encoded: Any, split: LabelSets, label_names: Sequence[str]
    ) -> WeightedFn:
        """Compare the predicted labels with those of the texts; NaN if a logit is not finite."""
        logits = np.stack(outputs)
        if not np.isfinite(logits).all():
            return lambda weights: np.full(len(weights), math.nan)
        truth, said = _indicators(split, label_names), (logits >= 0).astype(np.float64)
        if metric == "subset-accuracy":
            right = (truth == said).all(1)
            return lambda weights: ratio(weights @ right, weights.sum(1))
        both, either = 2 * truth * said, truth + said
        if metric == "micro-f1":
            return lambda weights: ratio(weights @ both.sum(1), weights @ either.sum(1))
        # As of classes, a mean leaves out labels that do not occur.
        return lambda weights: ratio(
            ratio(weights @ both, weights @ either).sum(1), (weights @ either > 0).sum(1)
        )

    def constant_output(self, train: LabelSets, label_names: Sequence[str]) -> np.ndarray:
        """Return logits of the labels that at least half of the texts have."""
        return np.where(_indicators(train, label_names).mean(0) >= 0.5, 1.0, -1.0).astype(np.float32)

    def predictions(
        self, answers: Sequence[Any], encoded: Any, split: LabelSets, label_names: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Return the predicted labels, their probabilities, and the logits of all labels."""
        rows = []
        for row in answers:
            chosen = [index for index, logit in enumerate(row) if logit >= 0]
            rows.append(
                {
                    "prediction": [label_names[index] for index in chosen],
                    "confidence": [1 / (1 + math.exp(-float(row[index]))) for index in chosen],
                    "logits": row.tolist(),
                }
            )
        return rows

    def chances(self, logits: np.ndarray) -> np.ndarray:
        """Return the sigmoid of each logit: labels do not exclude each other."""
        from scipy.special import expit

        return expit(np.asarray(logits, dtype=np.float64))

    def line(self, prediction: Mapping[str, Any], shown: str) -> str:
        """Return the labels with their probabilities, and the text."""
        pairs = zip(prediction["prediction"], prediction["confidence"], strict=True)
        return f"{', '.join(f'{name} {share:.3f}' for name, share in pairs) or '—'}\t{shown}"


def _is_list(cell: Any) -> bool:
    return isinstance(cell, list) and not any(isinstance(entry, (dict, list)) for entry in cell)


def _names(cell: Any, column: str | None) -> list[str]:
    if not _is_list(cell) or any(map(is_missing, cell)):
        got = "nothing" if cell is None else type(cell).__name__
        raise BadRow(
            f"must have a list of labels in column {column!r}, got {got}", 'Write ["a", "b"], for example.'
        )
    return sorted(set(map(class_name, cell)))


def _indicators(split: LabelSets, label_names: Sequence[str]) -> np.ndarray:
    """Return 1.0 for each label of each text, else 0.0: [texts, labels], float32."""
    ids = {name: index for index, name in enumerate(label_names)}
    table = np.zeros((len(split), len(label_names)), dtype=np.float32)
    for row, names in enumerate(split.names):
        table[row, [ids[name] for name in names]] = 1.0
    return table
