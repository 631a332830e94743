"""Which columns of a table hold the text and the label: by their usual names, or else by their content."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from childtuning.errors import DataError
from childtuning.tasks.delimited import BadRow
from childtuning.tasks.labels import is_missing, number_of
from childtuning.tasks.rows import Source

# Pairs before single texts: QNLI's (question, sentence) must not be read as a single sentence.
_TEXTS: tuple[tuple[str, str | None], ...] = (
    ("text1", "text2"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", None),
    ("sentence", None),
    ("text", None),
)
_LABELS = (
    "labels",
    "class",
    "category",
    "target",
    "sentiment",
    "intent",
    "topic",
    "rating",
    "stars",
    "score",
)
_SAMPLE = 1000  # rows that are looked at
_LONG_NAME = 60  # characters; a longer name of a column is data
_LONGER = 3  # how many times longer the text is than every other column of words
_FEW = 0.5  # a column with fewer distinct values, as a share of its rows, holds categories


def find_text(source: Source, label: str | None = None) -> tuple[str, str | None] | None:
    """Return the text column and, for pairs, the second text column; None if they are not clear.

    Usual names come first, whatever their case; otherwise it is the only column of long texts.

    Args:
        source: a table file.
        label: the label column, if it is named.
    """
    for text, pair in _TEXTS:
        first, second = source.find(text), None if pair is None else source.find(pair)
        if first is not None and (pair is None or second is not None):
            return first, second
    found = _longest_texts(source, label)
    return None if found is None else (found, None)


def find_label(source: Source, *taken: str | None) -> str | None:
    """Return the label column by its usual names, or the only column that is not taken; None if it is not clear.

    Args:
        source: a table file.
        taken: the text columns.
    """
    if source.find("label") is not None:
        return source.find("label")
    free = [column for column in source.columns if column not in taken]
    usual = [column for column in free if column.lower() in _LABELS]
    found = usual or (free if any(taken) else [])
    return found[0] if len(found) == 1 else None


def text_columns(source: Source, label: str | None = None) -> tuple[str, str | None]:
    """Return the columns that `find_text` finds; note them unless their names are usual.

    Raises:
        DataError: when they are not clear, or the header is missing.
    """
    found = find_text(source, label)
    if found is None or found[0].lower() not in (text for text, _ in _TEXTS):
        _check_header(source)
    if found is None:
        customary = ", ".join(text if pair is None else f"{text}/{pair}" for text, pair in _TEXTS)
        raise DataError(
            f"{source} has no column with a usual name for text ({customary}), and none that is clearly the text, "
            f"got {', '.join(source.columns) or 'none'}. Name the text column: --text NAME (text=)."
        )
    if found[0].lower() not in (text for text, _ in _TEXTS):
        source.note(f"the text is column {found[0]!r} (--text names another)")
    return found


def label_column(source: Source, *taken: str | None) -> str:
    """Return the column that `find_label` finds; note it unless it is called label.

    Raises:
        DataError: when it is not clear, or the header is missing.
    """
    found = find_label(source, *taken)
    if found is None or found.lower() not in ("label", *_LABELS):
        _check_header(source)
    if found is None:
        raise DataError(
            f"{source} has no column 'label', and no other that is clearly the label, got "
            f"{', '.join(source.columns)}. Name the label column: --label NAME (label=)."
        )
    if found.lower() != "label":
        source.note(f"the label is column {found!r} (--label names another)")
    return found


def text_of(value: Any, column: str | None) -> str:
    """Return a cell as text; a missing one is "".

    Raises:
        BadRow: when it is not text.
    """
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, (dict, list, bytes)):
        raise BadRow(
            f"must have text in column {column!r}, got {type(value).__name__}", "Write it as a string."
        )
    if isinstance(value, bool):
        return str(value).lower()
    # JSON may contain a lone surrogate, which no tokenizer accepts: it becomes "?".
    return str(value).encode("utf-8", "replace").decode("utf-8")


def _check_header(source: Source) -> None:
    """Refuse a table whose first row is data.

    A name is data if it is a number, is very long, or is a value further down in its own column.
    """
    if not source.is_named(".csv", ".tsv", ".xlsx"):
        return
    for column in source.columns:
        is_data = number_of(column) is not None or len(column) > _LONG_NAME
        if is_data or column in source.cells(column):
            shown = ", ".join(repr(name[:_LONG_NAME]) for name in source.columns)
            raise DataError(
                f"{source} seems to have no header: its first row is {shown}. "
                f"Add a first row such as text,label. If it has one, name its columns: --text, --label."
            )


def _longest_texts(source: Source, label: str | None) -> str | None:
    """Return the only column of texts that are much longer than those of every other column of words."""
    lengths = {}
    for column in source.columns:
        cells = [cell for cell in source.cells(column)[:_SAMPLE] if not is_missing(cell)]
        if column != label and cells and _is_prose(cells):
            lengths[column] = fmean(len(cell) for cell in cells)
    best = max(lengths, key=lambda column: lengths[column], default=None)
    others = [length for column, length in lengths.items() if column != best]
    return best if best is not None and lengths[best] >= _LONGER * max(others, default=0.0) else None


def _is_prose(cells: Sequence[Any]) -> bool:
    """Return whether cells are texts: mostly letters, most of them several words or in a script without spaces."""
    if not all(isinstance(cell, str) for cell in cells) or len(set(cells)) < _FEW * len(cells):
        return False
    likely = [
        sum(map(str.isalpha, cell)) >= len(cell) / 2 and (" " in cell.strip() or not cell.isascii())
        for cell in cells
    ]
    return sum(likely) > len(cells) / 2
