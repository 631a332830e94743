"""Label columns: classes or numbers, normalised across file types."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from childtuning.errors import DataError
from childtuning.tasks.delimited import BAD_SHARE, BadRow
from childtuning.tasks.split import Split

LabelKind = Literal["class", "number"]

_MAX_NAMED = 5  # the number of labels that a message lists by name
_MAX_NUMERIC_CLASSES = 20  # more distinct integers than this are numbers, not classes
_WHOLE_FLOAT = re.compile(r"([+-]?\d+)\.0+")
_NO_NUMBER = ("na", "n/a", "none", "null")  # beside numbers, what programs write for a missing one
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
_INTEGER = re.compile(r"[+-]?\d+")
_CODE = re.compile(r"0\d+")


def infer_label_kind(values: Sequence[Any]) -> LabelKind:
    """Return whether a column holds classes or numbers to predict.

    It holds numbers if nearly all values are numbers (or text that parses as one), the others being no more
    than the bad rows that a file may have, and some value is fractional or there are more than 20 distinct
    values; otherwise classes. Booleans are classes, and so are codes such as "007". Missing labels do not count, nor
    do words for them (NA, None), which are bad beside numbers and may be classes beside classes.

    Example:
        >>> infer_label_kind(["0", "1", "1"]), infer_label_kind(["0.5", 1]), infer_label_kind(range(21))
        ('class', 'number', 'number')
    """
    there = [value for value in values if not is_missing(value)]
    if any(isinstance(value, str) and _CODE.fullmatch(value.strip()) for value in there):
        return "class"
    numbers = [_meant_number(value) for value in there if str(value).strip().lower() not in _NO_NUMBER]
    known = [number for number in numbers if number is not None]
    if not known or len(numbers) - len(known) > BAD_SHARE * len(numbers):
        return "class"
    fractional = any(math.isfinite(number) and number != int(number) for number in known)
    return "number" if fractional or len(set(known)) > _MAX_NUMERIC_CLASSES else "class"


def _meant_number(value: Any) -> float | None:
    """Return the number that a label is meant to be, also with a decimal comma."""
    return number_of(_with_point(value) if _has_comma(value) else value)


def _has_comma(value: Any) -> bool:
    return isinstance(value, str) and _DECIMAL_COMMA.fullmatch(value.strip()) is not None


def _with_point(value: Any) -> Any:
    return value.replace(",", ".") if isinstance(value, str) else value


def has_decimal_commas(values: Iterable[Any]) -> bool:
    """Return whether a column of numbers is written with decimal commas.

    Some number has a comma, none has a point, and not every comma stands before three digits, as between thousands.

    Example:
        >>> has_decimal_commas(["3,5", "4"]), has_decimal_commas(["3,5", "4.0"]), has_decimal_commas(["1,250"])
        (True, False, False)
    """
    texts = [value.strip() for value in values if isinstance(value, str)]
    commas = [text for text in texts if _has_comma(text)]
    return any(len(text.split(",")[1]) != 3 for text in commas) and not any("." in text for text in texts)


def number_of(value: Any) -> float | None:
    """Return a label as a number, or None if it is not one."""
    if isinstance(value, bool) or (isinstance(value, str) and "_" in value):  # float("1_0") is 10
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def class_name(value: Any) -> str:
    """Return the canonical name of a class: 1, 1.0, "1" and "1.0" are "1"; True and "True" are "true".

    Example:
        >>> [class_name(value) for value in (1, 1.0, "1", "1.0", True, " spam ", 1.5)]
        ['1', '1', '1', '1', 'true', 'spam', '1.5']
    """
    # JSON may contain a lone surrogate, which cannot be written to a file: it becomes "?".
    text = str(value).encode("utf-8", "replace").decode("utf-8").strip()
    if text.lower() in ("true", "false"):
        return text.lower()
    whole = _WHOLE_FLOAT.fullmatch(text)
    return whole.group(1) if whole else text


def sort_labels(names: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct class names, sorted by value if all are integers, else alphabetically."""
    distinct = set(names)
    if all(_INTEGER.fullmatch(name) for name in distinct):
        return tuple(sorted(distinct, key=lambda name: (int(name), name)))
    return tuple(sorted(distinct))


_MISSING = frozenset(
    {"", "nan", "<na>", "#n/a", "#ref!", "#value!", "#name?", "#div/0!", "#null!"}
)  # of pandas and of Excel


def is_missing(value: Any) -> bool:
    """Return whether a cell holds no label: absent, null, blank or NaN, also in the spellings of pandas."""
    if value is None or (isinstance(value, str) and value.strip().lower() in _MISSING):
        return True
    return isinstance(value, float) and math.isnan(value)


def convert_label(
    value: Any, kind: LabelKind, column: str | None, *, decimal_commas: bool = False
) -> str | float:
    """Return a label as a class name or as a finite number.

    Args:
        value: the cell.
        kind: what labels are.
        column: its name.
        decimal_commas: whether "3,5" is three and a half.
    Raises:
        BadRow: when it is missing or not valid.
    """
    if is_missing(value):
        raise BadRow(f"has no label in column {column!r}, got {value!r}", "Fill it in or drop the row.")
    if isinstance(value, (dict, list, bytes)):
        raise BadRow(
            f"has a label of type {type(value).__name__} in column {column!r}",
            "Write labels as text or numbers.",
        )
    if kind == "class":
        return class_name(value)
    number = _meant_number(value) if decimal_commas else number_of(value)
    if number is None or not math.isfinite(number):
        raise BadRow(
            f"must have a finite number in column {column!r}, got {value!r}",
            "Write decimals with a point, and thousands without a separator."
            if _has_comma(value)
            else "Correct it, or pass --label-type class (label_type=) if the labels of all files are classes.",
        )
    return number


def check_labels(examples: Split, label_names: Iterable[str], *, where: str) -> set[str]:
    """Check that each class in `examples` is known, and return the classes.

    Args:
        examples: labelled with class names.
        label_names: the classes of the training set.
        where: the noun for the message, such as a file's name.
    Raises:
        DataError: naming up to five unknown labels, and the known labels.
    """
    known = list(label_names)
    found = examples.classes()
    unknown = sorted(found.difference(known))
    if unknown:
        remedy = (
            "Correct or drop those rows, or add training examples of these classes."
            if found.intersection(known)
            else "No label is known: write the classes as the training set does."
        )
        raise DataError(
            f"Labels that training never saw in {where}: {some_names(unknown)}. "
            f"Known: {some_names(known, 4 * _MAX_NAMED)}. {remedy}"
        )
    return found


def some_names(names: Iterable[str], most: int = _MAX_NAMED) -> str:
    """Return names in quotes, shortened if there are many.

    Example:
        >>> some_names("abc", 2)
        "'a', 'b' and 1 more"
    """
    listed = [repr(name) for name in names]
    rest = len(listed) - most
    return ", ".join(listed[:most]) + (f" and {rest} more" if rest > 0 else "")
