"""Rows of a table file (csv, tsv, json, jsonl, parquet, xlsx, each also .gz), as dictionaries."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from childtuning.errors import DataError, did_you_mean
from childtuning.tasks.delimited import BAD_SHARE, BadRow, Row, delimited_rows, header_names, row_of
from childtuning.tasks.encodings import content_of, decode

FORMATS = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".xlsx")
_NAMED = 3  # the number of bad rows that a message lists

_T = TypeVar("_T")
_Numbered = list[tuple[int, Row | BadRow]]


class Unreadable(NamedTuple):
    """A cell that Python cannot represent: a date after the year 9999, bytes that are not text."""

    fault: str


class Source:
    """A file or folder of the user; its content is read once and cached.

    csv and tsv values are strings; other values keep their types, and objects become columns with dotted names
    ("review.body"). Blank lines are skipped, and so are rows of several empty cells unless `strict`. A bad row is left
    out and counted in `notes`; more than one row in twenty, and more than one, are refused.

    Args:
        path: the file or folder.
        strict: refuse the first bad row.
        encoding: of a text file that is not UTF-8; None: Windows-1252 if that may be.
        sheet: the name of the sheet of a workbook with several; None: the first.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        strict: bool = False,
        encoding: str | None = None,
        sheet: str | None = None,
    ) -> None:
        self.path = Path(path).expanduser()
        self.strict, self._encoding, self._sheet = strict, encoding, sheet
        self._notes: list[str] = []
        self._bad: dict[int, BadRow] = {}
        self._unit = "row"  # what the numbers of rows count

    def __str__(self) -> str:
        return str(self.path)

    @property
    def notes(self) -> list[str]:
        """What was guessed about the file, and which rows were left out: one line each, for the user."""
        bad = sorted(self._bad.items())
        if not bad:
            return self._notes
        listing = "; ".join(f"{self._unit} {number} {row.fault}" for number, row in bad[:_NAMED])
        more = f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        total = len(self._numbered)
        return [
            *self._notes,
            f"{len(bad)} of {total} rows of {self.path.name} were left out: {listing}{more}",
        ]

    def note(self, words: str) -> None:
        """Add a note about the file: words that continue its name and a colon."""
        line = f"{self.path.name}: {words}"
        if line not in self._notes:
            self._notes.append(line)

    @property
    def is_table(self) -> bool:
        """Whether the name is that of a table file."""
        return format_of(self.path) is not None and not self.path.is_dir()

    def is_named(self, *endings: str) -> bool:
        """Return whether it is a file whose name has one of these endings, optionally followed by .gz."""
        return self.path.name.lower().removesuffix(".gz").endswith(endings) and not self.path.is_dir()

    @cached_property
    def text(self) -> str:
        """The content of a text file.

        Raises:
            DataError: when the file is missing, empty or damaged, or its encoding cannot be decided.
        """
        text, guessed = decode(content_of(self.path), self.path, self._encoding)
        if guessed:
            self.note(guessed)
        return text

    @cached_property
    def _numbered(self) -> _Numbered:
        """The rows of a table file, also bad ones, with their numbers."""
        form = format_of(self.path)
        if form is None:
            if self.path.is_dir():
                raise DataError(
                    f"{self.path} is a folder, which only images are read from. Pass a file ending in "
                    f"{', '.join(FORMATS)}."
                )
            raise DataError(
                f"{self.path} has an unsupported type, got {''.join(self.path.suffixes[-2:]) or 'no extension'!r}. "
                f"Pass a file ending in {', '.join(FORMATS)}, or one of these and .gz."
            )
        guessed: str | None = None
        if form == ".parquet":
            rows = _parquet_rows(content_of(self.path), self.path)
        elif form == ".xlsx":
            rows, guessed = _xlsx_rows(content_of(self.path), self.path, self._sheet)
        elif form in (".csv", ".tsv"):
            self._unit = "line"
            rows, guessed = delimited_rows(self.text, self.path, named="," if form == ".csv" else "\t")
        elif form == ".json" or self.text.lstrip()[:1] == "[":
            rows, guessed = _json_rows(self.text, self.path)
        else:
            self._unit = "line"
            rows = _json_lines(self.text)
        if guessed:
            self.note(guessed)
        if form in (".csv", ".tsv", ".xlsx") and not self.strict:
            rows = [(number, row) for number, row in rows if isinstance(row, BadRow) or not _is_blank(row)]
        if not rows:
            raise DataError(f"{self.path} has no rows. Pass a file with at least one example.")
        return rows

    @cached_property
    def _rows(self) -> dict[int, Row]:
        """The rows that are not bad, by number."""
        good = {number: row for number, row in self._numbered if not isinstance(row, BadRow)}
        self._leave_out({number: row for number, row in self._numbered if isinstance(row, BadRow)})
        return good

    def _leave_out(self, bad: dict[int, BadRow]) -> None:
        """Count bad rows; refuse the first one if there are too many."""
        self._bad |= bad
        total = len(self._numbered)
        allowed = 0 if self.strict else min(max(1, int(BAD_SHARE * total)), total - 1)
        if len(self._bad) > allowed:
            number = min(self._bad)
            first = self._bad[number]
            more = f" ({len(self._bad)} of {total} rows cannot be used)" if len(self._bad) > 1 else ""
            raise DataError(f"{self.path} {self._unit} {number} {first.fault}{more}. {first.remedy}")

    @cached_property
    def rows(self) -> list[Row]:
        """The rows of a table file that can be read."""
        return list(self._rows.values())

    @cached_property
    def columns(self) -> list[str]:
        """The columns of a table file, in order of appearance."""
        return list({name: None for row in self.rows for name in row})

    def find(self, name: str) -> str | None:
        """Return the column of this name, regardless of case if there is only one; None if there is none."""
        if name in self.columns:
            return name
        alike = [column for column in self.columns if column.lower() == name.lower()]
        return alike[0] if len(alike) == 1 else None

    def column(self, name: str) -> str:
        """Return the column of this name, as `find` does.

        Raises:
            DataError: when there is none, naming the closest, or its cells cannot be read.
        """
        found = self.find(name)
        if found is None:
            raise DataError(
                f"{self.path} has no column {name!r}. {did_you_mean(name, self.columns)} If it has another name there, "
                "rename it in the file."
            )
        if isinstance(first := self.rows[0].get(found), Unreadable):
            raise DataError(first.fault)
        return found

    def cells(self, name: str) -> list[Any]:
        """Return the cells of a column; None for rows without it. A column that does not exist has none."""
        found = self.find(name)
        return [] if found is None else [row.get(found) for row in self.rows]

    def each(self, read_fn: Callable[..., _T], *names: str | None) -> list[_T]:
        """Apply a function to the cells of each row; rows that are bad for it are left out.

        Args:
            read_fn: takes the cells and returns what the row holds; raises BadRow.
            names: columns; the cell of None is None.
        Raises:
            DataError: for a column that does not exist, or too many bad rows.
        """
        columns = [None if name is None else self.column(name) for name in names]
        found: list[_T] = []
        bad: dict[int, BadRow] = {}
        for number, row in self._rows.items():
            try:
                found.append(read_fn(*(None if name is None else row.get(name) for name in columns)))
            except BadRow as fault:
                bad[number] = fault
        self._leave_out(bad)
        return found


def as_source(path: str | Path | Source, **options: Any) -> Source:
    """Return a file or folder as a source; ``options`` as for ``Source``."""
    return path if isinstance(path, Source) else Source(path, **options)


def format_of(path: Path) -> str | None:
    """Return the format of a file by its name: one of `FORMATS`, or None."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in FORMATS if name.endswith(suffix)), None)


def _json_rows(text: str, path: Path) -> tuple[_Numbered, str | None]:
    """Read a list of objects, or an object with one such list; or else an object a line."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        is_json = isinstance(error, json.JSONDecodeError)
        if is_json and error.msg == "Extra data" and text.lstrip()[:1] == "{":
            return _json_lines(text), "read as one JSON object per line"
        reason = f"{error.msg} in line {error.lineno}" if is_json else type(error).__name__
        raise DataError(f"{path} is not JSON ({reason}). Write a list of objects.") from None
    entries, guessed = _list_of(whole, path)
    return [(number, _json_row(entry)) for number, entry in enumerate(entries, start=1)], guessed


def _list_of(whole: Any, path: Path) -> tuple[list[Any], str | None]:
    if isinstance(whole, list):
        return whole, None
    if isinstance(whole, dict) and len(whole) > 1 and _are_columns(list(whole.values())):
        numbers = list(next(iter(whole.values())))
        rows = [{name: column[number] for name, column in whole.items()} for number in numbers]
        return rows, "read as columns, as pandas' to_json writes them"
    lists = (
        [name for name, value in whole.items() if _holds_objects(value)] if isinstance(whole, dict) else []
    )
    if len(lists) == 1:
        return whole[lists[0]], f"its rows are the list {lists[0]!r}"
    if (
        isinstance(whole, dict)
        and whole
        and not any(isinstance(value, dict | list) for value in whole.values())
    ):
        return [whole], "read as one row"
    got = f"{len(lists)} of them: {', '.join(lists)}" if lists else type(whole).__name__
    raise DataError(
        f"{path} must hold one list of objects, got {got}. Write [{{…}}, {{…}}], pandas' to_json(orient='records')."
    )


def _are_columns(values: list[Any]) -> bool:
    """Whether these are columns: objects with the same row numbers as keys."""
    first = values[0]
    if not isinstance(first, dict) or not first or not all(key.isdigit() for key in first):
        return False
    return all(isinstance(value, dict) and value.keys() == first.keys() for value in values)


def _holds_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, dict) for entry in value)


def _json_lines(text: str) -> _Numbered:
    rows: _Numbered = []
    # Not splitlines: JSON strings may contain unescaped U+2028 and similar characters.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append((number, _json_row(json.loads(line))))
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
            rows.append((number, BadRow(f"is not JSON ({reason})", "Write one JSON object per line.")))
    return rows


def _json_row(value: Any) -> Row | BadRow:
    if not isinstance(value, dict):
        return BadRow(
            f"must be a JSON object, got {type(value).__name__}",
            'Write rows such as {"text": "…", "label": "…"}.',
        )
    return _flat(value)


def _flat(row: Row) -> Row:
    """Replace objects within a row by columns with dotted names; images ({"bytes": …, "path": …}) are kept."""
    flat: Row = {}
    for name, value in row.items():
        if isinstance(value, dict) and value and not is_image(value):
            flat |= {f"{name}.{inner}": cell for inner, cell in _flat(value).items()}
        else:
            flat[name] = value
    return flat


def _is_blank(row: Row) -> bool:
    """Whether a row has several cells, and nothing in any of them."""
    return len(row) > 1 and not any(str(cell).strip() for cell in row.values() if cell is not None)


def _xlsx_rows(content: bytes, path: Path, named: str | None) -> tuple[_Numbered, str | None]:
    try:
        from openpyxl import load_workbook
    except ImportError:
        raise DataError(
            f"{path} needs the package openpyxl, which is not installed. "
            f"Run pip install openpyxl, or save it as .csv."
        ) from None
    try:
        with warnings.catch_warnings():  # of styles and features that do not matter here
            warnings.simplefilter("ignore")
            book = load_workbook(io.BytesIO(content), read_only=True, data_only=True)
            names = [sheet.title for sheet in book.worksheets]  # charts have sheets of their own
            place = names.index(named) if named in names and len(names) > 1 else 0
            sheet = book.worksheets[place]
            cells = [(number, row) for number, row in enumerate(sheet.iter_rows(values_only=True), start=1)]
    except Exception as error:  # openpyxl raises what zipfile, its XML parser and its own checks do
        raise DataError(
            f"{path} is damaged or not a workbook ({type(error).__name__}). Save it again, or as .csv."
        ) from None
    if named is not None and len(names) > 1 and named not in names:
        raise DataError(f"{path} has no sheet {named!r}. {did_you_mean(named, names)}")
    filled = [(number, row) for number, row in cells if any(cell not in (None, "") for cell in row)]
    if not filled:
        return [], None
    (first, titles), last = filled[0], filled[-1][0]
    header = header_names(titles, path)
    rows: _Numbered = [
        (number, row_of(header, [*row, *[None] * len(header)][: len(header)]))
        for number, row in cells
        if first < number <= last
    ]
    if len(names) == 1 and named not in (None, names[0]):
        return rows, f"read its only sheet, {names[0]!r}: it has none named {named!r}"
    if len(names) == 1 or named is not None:
        return rows, None
    return rows, f"read the first of its {len(names)} sheets, {sheet.title!r}; --sheet names another"


def _parquet_rows(content: bytes, path: Path) -> _Numbered:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content))
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} is damaged or not parquet ({reason[:120]}). Save it again.") from None
    header_names(table.column_names, path)
    columns = {name: _values(table[name], path, name) for name in table.column_names}
    rows: Iterable[tuple[Any, ...]] = zip(*columns.values(), strict=True)
    return [(number, _flat(dict(zip(columns, row, strict=True)))) for number, row in enumerate(rows, start=1)]


def _values(column: Any, path: Path, name: str) -> list[Any]:
    """The values of a column; values that Python cannot represent raise only when the column is used."""
    import pyarrow

    try:
        return column.to_pylist()
    except (ValueError, OverflowError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0][:100]
        return [Unreadable(f"{path} column {name!r} cannot be read ({reason}). Save it again.")] * len(column)


def read_rows(path: str | Path) -> list[Row]:
    """Return every row of a table file, as ``Source`` reads it.

    Raises:
        DataError: for a file that is missing, empty, damaged or of another type.
    """
    return Source(path).rows


def is_image(cell: Any) -> bool:
    """Return whether a cell is an image as the library datasets stores it: {"bytes": …, "path": …}."""
    return isinstance(cell, dict) and cell.keys() == {"bytes", "path"}
