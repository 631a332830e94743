"""Examples and tasks from the user's own files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from childtuning.errors import ConfigError, DataError, did_you_mean
from childtuning.tasks.examples import Examples
from childtuning.tasks.kind import Columns, Task, check_metrics, find_kind, infer_kind
from childtuning.tasks.labels import LabelKind, convert_labels, infer_label_kind
from childtuning.tasks.rows import Row, Source

# Pairs before single texts: QNLI's (question, sentence) must not be read as a single sentence.
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
    """Return the text column and, for pairs, the second text column, by their usual names.

    Args:
        columns: the file's column names; case is ignored.
    Raises:
        DataError: when no column has a usual name.
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
        f"No column has a usual name for text ({customary}), got {', '.join(columns) or 'none'}. "
        f"Name the text column: --text NAME (text=)."
    )


def read_examples(
    path: str | Path | Source,
    *,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = "label",
    label_kind: LabelKind | None = None,
) -> Examples:
    """Read one split from a file that `read_rows` can read.

    Args:
        path: csv, tsv, jsonl or parquet, each also .gz.
        text: the text column; None guesses it and the second one (see `guess_columns`).
        text_pair: the column of second texts; None means single texts if `text` is named.
        label: the label column; None reads unlabelled examples.
        label_kind: "class" or "number"; None infers it from the column.
    Returns:
        Labels as class names (str) or numbers (float); a missing text is "".
    Raises:
        DataError: for a file that `read_rows` rejects, an unknown column, or a row without a usable label.
    """
    source = path if isinstance(path, Source) else Source(path)
    path, rows = source.path, source.rows
    if text is None:
        text, guessed_pair = guess_columns(source.columns)
        text_pair = text_pair or guessed_pair
    source.check_columns(text, text_pair, label)
    if label is not None and label in (text, text_pair):
        raise DataError(
            f"Column {label!r} of {path} cannot be text and label at once. Name another label column."
        )
    labels: list[str] | list[float] | None = None
    if label is not None:
        values = [row.get(label) for row in rows]
        labels = convert_labels(values, label_kind or infer_label_kind(values), where=str(path), column=label)
    return Examples(
        text=texts_of(rows, text, path),
        text_pair=None if text_pair is None else texts_of(rows, text_pair, path),
        labels=labels,
    )


def task_from_files(
    train: str | Path,
    dev: str | Path,
    *,
    kind: str | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    label_type: Literal["auto", "class", "number"] = "auto",
    name: str = "files",
    metric: str | None = None,
    train_limit: int | None = None,
    seed: int = 0,
) -> Task:
    """Build a task from a training and an evaluation file or folder.

    Args:
        train, dev: the files, whose types may differ; or one file that holds both splits.
        kind: the kind of task; None infers it from `train`.
        text, text_pair, label: columns; None uses the kind's defaults.
        label_type: for texts: "class", "number", or "auto" to infer it from the training labels.
        name: the task's name in reports.
        metric: the metric of the run; None uses the kind's first.
        train_limit: the maximum number of training rows, drawn with `seed`; None keeps all.
        seed: the seed of that draw.
    Raises:
        DataError: for data that the kind or `Task` rejects.
        ConfigError: for an unknown metric or label type, or a metric that does not fit the labels.
    """
    if label_type not in ("auto", "class", "number"):
        remedy = did_you_mean(str(label_type), ("auto", "class", "number"))
        raise ConfigError(f"Unknown label type {label_type!r}. {remedy}")
    train_source, dev_source = Source(train), Source(dev)
    columns = Columns(text, text_pair, label, label_type)
    how = infer_kind(train_source, columns) if kind is None else find_kind(kind)
    if metric is not None:
        check_metrics(how, [metric])
    columns = how.settle(train_source, columns)
    train_rows = how.read(train_source, columns, part="train")
    dev_rows = how.read(dev_source, columns, part="dev")
    label_names = how.label_names(train_rows)
    defaults = how.metrics(label_names)
    return Task(
        name=name,
        kind=how.name,
        label_names=label_names,
        metrics=defaults if metric is None else (metric, *(other for other in defaults if other != metric)),
        train=train_rows.sample(train_limit, seed=seed),
        dev=dev_rows,
        columns=columns,
    )


def texts_of(rows: list[Row], column: str, path: Path) -> list[str]:
    """Return a column as text; a missing value is "".

    Raises:
        DataError: when a value is not text.
    """
    return [text_of(row.get(column), path, column, number) for number, row in enumerate(rows, start=1)]


def text_of(value: Any, path: Path, column: str, row: int) -> str:
    """Return one value of a table as text.

    Raises:
        DataError: when the value is not text; the message names the row (counted from 1).
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, (dict, list, bytes)):
        raise DataError(
            f"{path} row {row} must have text in column {column!r}, got {type(value).__name__}. "
            f"Write it as a string."
        )
    if isinstance(value, bool):
        return str(value).lower()
    # JSON may contain a lone surrogate, which no tokenizer accepts: it becomes "?".
    return str(value).encode("utf-8", "replace").decode("utf-8")
