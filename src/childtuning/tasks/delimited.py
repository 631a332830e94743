"""Tables of delimited text: the separator, the header and the fields of each row."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from childtuning.errors import DataError

Row = dict[str, Any]

_LONGEST_FIELD = 2**31 - 1  # the largest limit that the csv module accepts with a 32-bit C long
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_SAMPLE = 200  # rows that decide the separator
BAD_SHARE = 0.05  # the share of bad rows that may be left out; a single one always may
_CLEAR = 0.5  # the share of these rows that must have as many fields as the header


class BadRow(Exception):
    """A row that cannot be used.

    Args:
        fault: continues "line 3 …".
        remedy: a sentence.
    """

    def __init__(self, fault: str, remedy: str) -> None:
        super().__init__(fault, remedy)
        self.fault, self.remedy = fault, remedy


def delimited_rows(text: str, path: Path, *, named: str) -> tuple[list[tuple[int, Row | BadRow]], str | None]:
    """Read the rows of delimited text, whatever its separator.

    A first line ``sep=;`` names the separator. Quotes follow RFC 4180. Text separated by tabs whose quotes do not pair
    is read with quotes as plain characters, as GLUE's own files require.

    Args:
        text: the content of the file.
        path: the file, for messages.
        named: the separator that the file's name stands for.
    Returns:
        each row with the number of its first line, and what was guessed: None if the separator is as named.
    Raises:
        DataError: when the separator cannot be decided, a quote is not closed, or a column occurs twice.
    """
    said = re.match(r'"?sep=([,;\t|])"?[ \t]*\r?\n', text, re.IGNORECASE)  # as Excel writes it
    if said is not None:
        text = "\n" + text[said.end() :]  # the lines keep their numbers
    mark = said[1] if said is not None else _separator(text, path, named)
    note = None if mark == named else f"its columns are separated by {_SEPARATORS[mark]}"
    if mark != "\t":
        rows = _rows(text, path, mark)
        _check_swallowed(rows, path, mark)
        return rows, note
    try:
        rows = _rows(text, path, mark)
        # A quote in one line and another in a later one would swallow the lines between.
        swallowed = any(
            mark in value and "\n" in value
            for _, row in rows
            if not isinstance(row, BadRow)
            for value in row.values()
        )
        if not swallowed and not ('"' in text and any(isinstance(row, BadRow) for _, row in rows)):
            return rows, note
    except DataError:
        if '"' not in text:
            raise
    return _rows(text, path, mark, quoting=csv.QUOTE_NONE), note


def _check_swallowed(rows: Sequence[tuple[int, Row | BadRow]], path: Path, mark: str) -> None:
    """Refuse a field whose inner lines are rows: as many fields as a row, one of them a cell of other rows' column."""
    whole = [(start, row) for start, row in rows if not isinstance(row, BadRow)]
    known: list[set[Any]] = []
    for start, row in whole:
        for value in row.values():
            inner = [line.split(mark) for line in value.split("\n")[1:-1]]
            if not inner or any(len(fields) != len(row) for fields in inner):
                continue
            known = known or [{other[name] for _, other in whole} for name in row]
            columns = [{cell.strip() for cell in cells} for cells in zip(*inner, strict=True)]
            if any(cells <= others for cells, others in zip(columns, known, strict=True)):
                raise DataError(
                    f"{path} line {start} has a quote that closes {len(inner) + 1} lines further down, so that the "
                    "rows between are one field. Remove the quote, or double it."
                )


def header_names(cells: Sequence[Any], path: Path) -> list[str]:
    """Return the names of a header's columns, without the spaces around them; "" for those without a name.

    Raises:
        DataError: when a name occurs twice.
    """
    names = ["" if cell is None else str(cell).strip() for cell in cells]
    repeated = sorted(name for name, count in Counter(names).items() if count > 1 and name)
    if repeated:
        raise DataError(f"{path} has more than one column {repeated[0]!r}. Rename or drop the repeated ones.")
    return names


def row_of(names: Sequence[str], cells: Sequence[Any]) -> Row:
    """Return a row by column, without the columns that have no name."""
    return {name: cell for name, cell in zip(names, cells, strict=True) if name}


def _rows(
    text: str, path: Path, mark: str, quoting: int = csv.QUOTE_MINIMAL
) -> list[tuple[int, Row | BadRow]]:
    # Strict, so that an unclosed quote is an error and not a field that runs to the end of the file.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, quoting=quoting, strict=True)  # type: ignore[arg-type]
    with _long_fields():
        try:
            header = next((fields for fields in reader if fields), [])
            names = header_names(header, path)
            rows: list[tuple[int, Row | BadRow]] = []
            start = reader.line_num + 1
            for fields in reader:
                if fields:  # no blank line
                    rows.append((start, _row(names, header, fields)))
                start = reader.line_num + 1
            return rows
        except csv.Error as error:
            raise DataError(
                f"{path} line {reader.line_num} is malformed ({error}). "
                f"Close every quote, and double quotes inside fields."
            ) from None


def _row(names: list[str], header: list[str], fields: list[str]) -> Row | BadRow:
    if len(fields) != len(names):
        fault = f"has {len(fields)} field{'s' * (len(fields) != 1)}, not {len(names)}"
        return BadRow(fault, "Quote fields that contain the separator or a newline.")
    if fields == header:
        return BadRow("repeats the header", "Drop it.")
    return row_of(names, fields)


def _separator(text: str, path: Path, named: str) -> str:
    """Return the separator whose fields are as many in the rows as in the header."""
    marks = [named, *(mark for mark in _SEPARATORS if mark != named)]
    shares = {mark: share for mark in marks if (share := _regular(text, mark)) >= _CLEAR}
    best = [mark for mark, share in shares.items() if share == max(shares.values())]
    if len(best) > 1:
        names = " or ".join(_SEPARATORS[mark] for mark in best)
        raise DataError(
            f"{path} may have its columns separated by {names}: both fit every row. "
            f"Save it as .jsonl, or quote the fields that contain the other mark."
        )
    return best[0] if best else named


def _regular(text: str, mark: str) -> float:
    """Return the share of the first rows with as many fields as the header; 0 if the header has only one."""
    found = [0.0]
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE) if mark == "\t" else (csv.QUOTE_MINIMAL,):
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, quoting=quoting)  # type: ignore[arg-type]
        with _long_fields():
            try:
                header, *rows = islice((fields for fields in reader if fields), _SAMPLE + 1)
            except (csv.Error, ValueError):  # a broken quote, or no header
                continue
        if len(header) > 1:
            found.append(sum(len(fields) == len(header) for fields in rows) / len(rows) if rows else 1.0)
    return max(found)


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lift the csv module's limit on the length of fields."""
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)
