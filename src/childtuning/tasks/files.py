"""Examples and tasks from the user's own files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from childtuning.errors import ConfigError, DataError, did_you_mean
from childtuning.tasks.columns import text_columns, text_of
from childtuning.tasks.examples import Examples
from childtuning.tasks.kind import Columns, Task, check_metrics, find_kind, infer_kind
from childtuning.tasks.labels import (
    LabelKind,
    convert_label,
    infer_label_kind,
    some_names,
)
from childtuning.tasks.rows import Source
from childtuning.tasks.split import Split


def read_examples(
    path: str | Path | Source,
    *,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = "label",
    label_kind: LabelKind | None = None,
    decimal_commas: bool = False,
) -> Examples:
    """Read one split from a table file.

    Args:
        path: a table file, or a `Source`, which counts the rows that are left out.
        text: the text column; None guesses it and the second one (see `text_columns`).
        text_pair: the column of second texts; None means single texts if `text` is named.
        label: the label column; None reads unlabelled examples.
        label_kind: "class" or "number"; None infers it from the column.
        decimal_commas: whether numbers are written as "3,5".
    Returns:
        Labels as class names (str) or numbers (float); a missing text is "".
    Raises:
        DataError: for a file that cannot be read, an unknown column, or too many rows without a usable label.
    """
    source = path if isinstance(path, Source) else Source(path)
    if text is None:
        text, guessed_pair = text_columns(source, label)
        text_pair = text_pair or guessed_pair
    columns = [None if name is None else source.column(name) for name in (text, text_pair, label)]
    if label is not None and columns[2] in columns[:2]:
        raise DataError(
            f"Column {label!r} of {source} cannot be text and label at once. Name another label column."
        )
    kind = None if label is None else label_kind or infer_label_kind(source.cells(label))

    def read(*cells: Any) -> tuple[str, str, Any]:
        target = None if kind is None else convert_label(cells[2], kind, label, decimal_commas=decimal_commas)
        return text_of(cells[0], text), text_of(cells[1], text_pair), target

    rows = source.each(read, text, text_pair, label)
    return Examples(
        text=[first for first, _, _ in rows],
        text_pair=None if text_pair is None else [second for _, second, _ in rows],
        labels=None if label is None else [target for _, _, target in rows],
    )


def task_from_files(
    train: str | Path,
    dev: str | Path | None = None,
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
    eval_share: float = 0.2,
    folds: int | None = None,
    fold: int | None = None,
    strict: bool = False,
    encoding: str | None = None,
    sheet: str | None = None,
) -> Task:
    """Build a task from a training and an evaluation file or folder.

    Args:
        train, dev: the files, whose types may differ; or one file that holds both splits. Without `dev`, it is a
            share of the training examples, drawn by class, unless the file holds both splits.
        kind: the kind of task; None infers it from `train`.
        text, text_pair, label: columns; None uses the kind's defaults.
        label_type: for texts: "class", "number", or "auto" to infer it from the training labels.
        name: the task's name in reports.
        metric: the metric of the run; None uses the kind's first.
        train_limit: the maximum number of training rows, drawn with `seed`; None keeps all.
        seed: the seed of both draws.
        eval_share: the share of the training examples to evaluate on, if there is neither `dev` nor `folds`.
        folds: the number of parts of the training examples for cross-validation; then all are evaluated on.
        fold: the part to evaluate on, from 1; the others are trained on. None trains on all.
        strict, encoding, sheet: as for `Source`.
    Raises:
        DataError: for data that the kind or `Task` rejects.
        ConfigError: for an unknown metric or label type, or a metric that does not fit the labels.
    """
    if label_type not in ("auto", "class", "number"):
        remedy = did_you_mean(str(label_type), ("auto", "class", "number"))
        raise ConfigError(f"Unknown label type {label_type!r}. {remedy}")
    reading = {"strict": strict, "encoding": encoding, "sheet": sheet}
    source = Source(train, **reading)
    columns = Columns(text, text_pair, label, label_type)
    how = infer_kind(source, columns) if kind is None else find_kind(kind)
    if metric is not None:
        check_metrics(how, [metric])
    columns = how.settle(source, columns)
    train_rows = how.read(source, columns, part="train")
    label_names = how.label_names(train_rows)
    dev_source = source if dev is None else Source(dev, **reading)
    if folds is not None:
        train_rows, dev_rows = _fold(train_rows, folds, fold, seed)
    elif dev is None and not how.holds_both(source):
        train_rows, dev_rows = _set_aside(train_rows, eval_share, source, seed)
    else:
        dev_rows = how.read(dev_source, columns, part="dev")
    defaults = how.metrics(label_names)
    task = Task(
        name=name,
        kind=how.name,
        label_names=label_names,
        metrics=defaults if metric is None else (metric, *(other for other in defaults if other != metric)),
        train=train_rows,
        dev=dev_rows,
        columns=columns,
        notes=tuple(dict.fromkeys([*source.notes, *dev_source.notes])),
    )
    return task.draw(train_limit, seed=seed)


def _columns_of(source: Source) -> list[str]:
    return source.columns if source.is_table else []


def _fold(rows: Split, folds: int, fold: int | None, seed: int) -> tuple[Split, Split]:
    """Return the examples to train and to evaluate on."""
    parts = rows.folds(folds, seed=seed)
    if fold is None:
        return rows, rows
    aside = {*parts[fold - 1]}
    return rows.subset(row for row in range(len(rows)) if row not in aside), rows.subset(sorted(aside))


def _set_aside(rows: Split, share: float, source: Source, seed: int) -> tuple[Split, Split]:
    """Split off a share of the training examples for evaluation, and note it."""
    train, dev = rows.hold_out(share, seed=seed)
    by_class = ", drawn by class" if rows.strata() else ""
    counted = (
        f"{len(dev)} of the {len(rows)} examples are"
        if len(rows) > 1
        else f"the last {share:.0%} of the text is"
    )
    missing = sorted(train.classes() - dev.classes()) if rows.strata() else []
    rare = f"; it has none of the rare {some_names(missing)}" if missing else ""
    parts = next(
        (name for name in _columns_of(source) if name.lower() in ("split", "fold", "partition")), None
    )
    if parts is not None:
        source.note(
            f"column {parts!r} is not used: write its parts to files of their own if they should stay apart"
        )
    source.note(f"no --eval, so {counted} set aside for evaluation{by_class}{rare}")
    return train, dev
