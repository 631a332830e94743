"""Examples and tasks from the user's own files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from childtuning.errors import ConfigError, DataError, did_you_mean
from childtuning.tasks.examples import Examples, Task
from childtuning.tasks.labels import LabelKind, convert_labels, infer_label_kind, sort_labels
from childtuning.tasks.metrics import METRICS, default_metrics
from childtuning.tasks.rows import Row, columns_of, read_rows

# Pairs before single texts: QNLI's (question, sentence) must not be taken for a single sentence.
_KNOWN_COLUMNS: tuple[tuple[str, str | None], ...] = (
    ("text1", "text2"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", None),
    ("sentence", None),
    ("text", None),
)


def guess_columns(columns: Sequence[str]) -> tuple[str, str | None]:
    """Return the text column and, for pairs, the second text column, by their customary names.

    Args:
        columns: the names there are; upper and lower case do not matter.
    Raises:
        DataError: when none of the customary names is there.
    Example:
        >>> guess_columns(["idx", "premise", "hypothesis"]), guess_columns(["Text", "label"])
        (('premise', 'hypothesis'), ('Text', None))
    """
    by_lower = {name.lower(): name for name in reversed(columns)}
    for text, pair in _KNOWN_COLUMNS:
        if text in by_lower and (pair is None or pair in by_lower):
            return by_lower[text], None if pair is None else by_lower[pair]
    customary = ", ".join(text if pair is None else f"{text}/{pair}" for text, pair in _KNOWN_COLUMNS)
    raise DataError(
        f"No column has a customary name for text ({customary}), got {', '.join(columns) or 'none'}. "
        f"Name the text column."
    )


def read_examples(
    path: str | Path,
    *,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = "label",
    label_kind: LabelKind | None = None,
) -> Examples:
    """Read one split from a file that `read_rows` can read.

    Args:
        path: csv, tsv, jsonl or parquet, each also .gz.
        text: the text column; None guesses it (see `guess_columns`), and the second one with it.
        text_pair: the column of second texts; None for single texts where `text` is named.
        label: the label column; None reads unlabelled examples.
        label_kind: "class" or "number"; None infers it from the column.
    Returns:
        Labels as class names (str) or numbers (float); a missing text is "".
    Raises:
        DataError: for what `read_rows` refuses, an unknown column, or a row without a usable label.
    """
    path = Path(path)
    rows = read_rows(path)
    columns = columns_of(rows)
    if text is None:
        text, guessed_pair = guess_columns(columns)
        text_pair = text_pair or guessed_pair
    for column in (text, text_pair, label):
        if column is not None and column not in columns:
            raise DataError(f"{path} has no column {column!r}. {did_you_mean(column, columns)}")
    if label is not None and label in (text, text_pair):
        raise DataError(
            f"Column {label!r} of {path} cannot be text and label at once. Name another label column."
        )
    labels: list[str] | list[float] | None = None
    if label is not None:
        values = [row.get(label) for row in rows]
        labels = convert_labels(values, label_kind or infer_label_kind(values), where=str(path), column=label)
    return Examples(
        text=_texts(rows, text, path),
        text_pair=None if text_pair is None else _texts(rows, text_pair, path),
        labels=labels,
    )


def task_from_files(
    train: str | Path,
    dev: str | Path,
    *,
    text: str | None = None,
    text_pair: str | None = None,
    label: str = "label",
    label_type: Literal["auto", "class", "number"] = "auto",
    name: str = "files",
    metric: str | None = None,
    train_limit: int | None = None,
    seed: int = 0,
) -> Task:
    """Build a task from a file to train on and a file to measure on, of any two of the types.

    Args:
        train, dev: the files.
        text, text_pair, label: columns, as for `read_examples`.
        label_type: "class", "number", or "auto" to infer it from the training labels.
        name: what reports call the task.
        metric: the metric of the run; None takes accuracy for classes, Pearson's r for numbers.
        train_limit: the most training rows to keep, drawn by `seed`; None keeps all.
        seed: of that draw.
    Raises:
        DataError: for what `read_examples` and `Task` refuse.
        ConfigError: for an unknown metric or label type, or a metric that does not fit the labels.
    """
    if label_type not in ("auto", "class", "number"):
        remedy = did_you_mean(str(label_type), ("auto", "class", "number"))
        raise ConfigError(f"Unknown label type {label_type!r}. {remedy}")
    wanted: LabelKind | None = None if label_type == "auto" else label_type
    train_rows = read_examples(train, text=text, text_pair=text_pair, label=label, label_kind=wanted)
    train_labels = train_rows.labels or []
    kind: LabelKind = "number" if isinstance(train_labels[0], float) else "class"
    dev_rows = read_examples(dev, text=text, text_pair=text_pair, label=label, label_kind=kind)
    label_names = sort_labels(str(value) for value in train_labels) if kind == "class" else ()
    return Task(
        name=name,
        kind="classification" if kind == "class" else "regression",
        label_names=label_names,
        metrics=_metrics_for(kind, metric),
        train=train_rows.sample(train_limit, seed=seed),
        dev=dev_rows,
    )


def _metrics_for(kind: LabelKind, metric: str | None) -> tuple[str, ...]:
    """Return the metrics of a task, the asked-for one first."""
    task_kind = "classification" if kind == "class" else "regression"
    defaults = default_metrics(task_kind)
    if metric is None:
        return defaults
    if metric not in METRICS:
        raise ConfigError(f"Unknown metric {metric!r}. {did_you_mean(metric, METRICS)}")
    if METRICS[metric].kind != task_kind:
        fitting = [name for name, entry in METRICS.items() if entry.kind == task_kind]
        raise ConfigError(f"Metric {metric!r} does not fit {task_kind}. Pass one of {', '.join(fitting)}.")
    return (metric, *(name for name in defaults if name != metric))


def _texts(rows: list[Row], column: str, path: Path) -> list[str]:
    return [_text_of(row.get(column), path, column, number) for number, row in enumerate(rows, start=1)]


def _text_of(value: Any, path: Path, column: str, row: int) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, (dict, list, bytes)):
        raise DataError(
            f"{path} row {row} must have text in column {column!r}, got {type(value).__name__}. "
            f"Write it as a string."
        )
    if isinstance(value, bool):
        return str(value).lower()
    # JSON can spell half of a surrogate pair, which no tokenizer takes: it becomes "?".
    return str(value).encode("utf-8", "replace").decode("utf-8")
