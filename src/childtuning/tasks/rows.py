"""Rows of a table file (csv, tsv, jsonl, parquet, each also .gz), as dictionaries."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from childtuning.errors import DataError, did_you_mean

Row = dict[str, Any]

FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")
_LONGEST_FIELD = 2**31 - 1  # the largest limit that the csv module accepts with a 32-bit C long


def read_rows(path: str | Path) -> list[Row]:
    """Read every row of a table file.

    csv and tsv values are strings; jsonl and parquet values keep their types. Text is UTF-8, with or without a byte
    order mark, or UTF-16 with one. Blank lines are skipped. A tsv file with unbalanced quotes is read with quotes
    as plain characters, as GLUE's own files require.

    Args:
        path: a file that ends in .csv, .tsv, .jsonl or .parquet, or one of these and .gz.
    Returns:
        One dictionary per row; at least one row.
    Raises:
        DataError: for a file that is missing, empty, damaged, not UTF-8, of another type, or has a row
            that does not fit; one line that names the file and the line.
    """
    path = Path(path)
    suffix = format_of(path)
    if suffix is None:
        raise DataError(
            f"{path} has an unsupported type, got {''.join(path.suffixes[-2:]) or 'no extension'!r}. "
            f"Pass a file ending in {', '.join(FORMATS)}, or one of these and .gz."
        )
    content = content_of(path)
    if suffix == ".parquet":
        rows = _parquet_rows(content, path)
    else:
        text = _decode(content, path)
        if suffix == ".jsonl":
            rows = _jsonl_rows(text, path)
        elif suffix == ".tsv":
            rows = _tsv_rows(text, path)
        else:
            rows = _delimited_rows(text, path, delimiter=",")
    if not rows:
        raise DataError(f"{path} has no rows. Pass a file with at least one example.")
    return rows


class Unreadable(NamedTuple):
    """A cell that Python cannot represent: a date after the year 9999, bytes that are not text."""

    fault: str


class Source:
    """A file or folder of the user; its content is read once and cached.

    Args:
        path: the file or folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def is_table(self) -> bool:
        """Whether the name is that of a table file."""
        return format_of(self.path) is not None and not self.path.is_dir()

    def is_named(self, *endings: str) -> bool:
        """Return whether it is a file whose name has one of these endings, optionally followed by .gz."""
        return self.path.name.lower().removesuffix(".gz").endswith(endings) and not self.path.is_dir()

    @cached_property
    def rows(self) -> list[Row]:
        """The rows of a table file; see `read_rows`."""
        return read_rows(self.path)

    @cached_property
    def columns(self) -> list[str]:
        """The columns of a table file."""
        return columns_of(self.rows)

    @cached_property
    def text(self) -> str:
        """The content of a text file; see `read_text`."""
        return read_text(self.path)

    def check_columns(self, *names: str | None) -> None:
        """Check that a table file has these columns.

        Raises:
            DataError: naming the first missing column and the closest existing one.
        """
        for name in names:
            if name is not None and name not in self.columns:
                raise DataError(f"{self.path} has no column {name!r}. {did_you_mean(name, self.columns)}")
            if name is not None and isinstance(first := self.rows[0].get(name), Unreadable):
                raise DataError(first.fault)


def columns_of(rows: Iterable[Row]) -> list[str]:
    """Return every column that occurs in any row, in order of appearance."""
    return list({name: None for row in rows for name in row})


def format_of(path: Path) -> str | None:
    """Return the format of a file by its name: one of `FORMATS`, or None."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in FORMATS if name.endswith(suffix)), None)


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 text file, optionally .gz.

    Raises:
        DataError: when the file is missing, empty, damaged or not UTF-8.
    """
    return _decode(content_of(path), path)


def content_of(path: Path) -> bytes:
    """Return the bytes of a file, unpacked if it is .gz.

    Raises:
        DataError: when the file is missing, empty or damaged.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder. Pass a file.")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"There is no file {path}. Check the path.") from None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}. Check the path and its permissions."
        ) from None
    if path.name.lower().endswith(".gz") and content:
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{path} is truncated or not gzip ({error}). Copy it again, or drop .gz from its name."
            ) from None
    if not content:
        raise DataError(f"{path} is empty. Pass a file with at least one example.")
    return content


def _decode(content: bytes, path: Path) -> str:
    """Decode UTF-8, or UTF-16 with a byte order mark; refuse other encodings rather than guess."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            content = content.decode("utf-16", "surrogatepass").encode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise DataError(f"{path} is truncated: it begins as UTF-16. Save it as UTF-8.") from None
    if content.startswith(b"PK"):
        raise DataError(f"{path} is a zip archive, such as Excel writes, not text. Export it as CSV (UTF-8).")
    if b"\0" in content:
        raise DataError(
            f"{path} contains zero bytes, as UTF-16 without a byte order mark does. Save it as UTF-8."
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path} is not UTF-8: byte 0x{content[error.start]:02x} in line {line}, perhaps Windows-1252 (Latin-1). "
            "Save it as UTF-8."
        ) from None


def _jsonl_rows(text: str, path: Path) -> list[Row]:
    rows: list[Row] = []
    # Not splitlines: JSON strings may contain unescaped U+2028 and similar characters.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
            raise DataError(
                f"{path} line {number} is not JSON ({reason}). Write one JSON object per line."
            ) from None
        if not isinstance(row, dict):
            raise DataError(
                f"{path} line {number} must be a JSON object, got {type(row).__name__}. "
                f'Write lines such as {{"text": "…", "label": "…"}}.'
            )
        rows.append(row)
    return rows


def _tsv_rows(text: str, path: Path) -> list[Row]:
    try:
        rows = _delimited_rows(text, path, delimiter="\t")
        # A quote in one line and another in a later one would swallow the lines between.
        if not any("\t" in value and "\n" in value for row in rows for value in row.values()):
            return rows
    except DataError:
        if '"' not in text:
            raise
    return _delimited_rows(text, path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _delimited_rows(text: str, path: Path, *, delimiter: str, quoting: int = csv.QUOTE_MINIMAL) -> list[Row]:
    # Strict, so that an unclosed quote is an error and not a field that runs to the end of the file.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)  # type: ignore[arg-type]
    previous_limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        header = [name.strip() for name in next((fields for fields in reader if fields), [])]
        _check_separator(header, path, delimiter)
        _check_header(header, path)
        rows: list[Row] = []
        start = reader.line_num + 1
        for fields in reader:
            if fields and len(fields) != len(header):
                raise DataError(
                    f"{path} line {start} must have {len(header)} fields, as in the header, "
                    f"got {len(fields)}. Quote fields that contain the separator or a newline."
                )
            if fields:
                rows.append(dict(zip(header, fields, strict=True)))
            start = reader.line_num + 1
        return rows
    except csv.Error as error:
        raise DataError(
            f"{path} line {reader.line_num} is malformed ({error}). "
            f"Close every quote, and double quotes inside fields."
        ) from None
    finally:
        csv.field_size_limit(previous_limit)


def _check_separator(header: list[str], path: Path, delimiter: str) -> None:
    """Refuse a table with a single column whose name contains another format's separator."""
    others = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
    only = header[0] if len(header) == 1 else ""
    found = next((name for mark, name in others.items() if mark != delimiter and mark in only), None)
    if found:
        raise DataError(
            f"{path} has one column, {header[0][:60]!r}: its columns are separated by {found}, not by "
            f"{others[delimiter]} as its name says. Save a .csv with commas, or a .tsv with tabs."
        )


def _check_header(header: list[str], path: Path) -> None:
    repeated = sorted(name for name, count in Counter(header).items() if count > 1)
    if repeated:
        raise DataError(f"{path} has more than one column {repeated[0]!r}. Rename or drop the repeated ones.")


def _parquet_rows(content: bytes, path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content))
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} is damaged or not parquet ({reason[:120]}). Save it again.") from None
    _check_header(table.column_names, path)
    columns = {name: _values(table[name], path, name) for name in table.column_names}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _values(column: Any, path: Path, name: str) -> list[Any]:
    """The values of a column; values that Python cannot represent raise only when the column is used."""
    import pyarrow

    try:
        return column.to_pylist()
    except (ValueError, OverflowError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0][:100]
        return [Unreadable(f"{path} column {name!r} cannot be read ({reason}). Save it again.")] * len(column)
