"""Reading tables: every type round trips, and every broken file is one clear line."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from childtuning.errors import DataError
from childtuning.tasks.rows import FORMATS, Source, read_rows

ROWS: list[dict[str, Any]] = [
    {"text": 'a "quoted", line\nand another', "label": "x"},
    {"text": "tab\there, ünïcode \u2028 and 数", "label": "y"},
    {"text": "", "label": "x"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as the path's extension says."""
    name = path.name.removesuffix(".gz")
    plain = path.with_name(name)
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), plain)
    elif name.endswith(".jsonl"):
        plain.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
    else:
        with plain.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if name.endswith(".tsv") else ",")
            writer.writeheader()
            writer.writerows(rows)
    if path != plain:
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    return path


@pytest.mark.parametrize("extension", [suffix + end for suffix in FORMATS for end in ("", ".gz")] + [".CSV"])
def test_every_type_round_trips(tmp_path, extension):
    path = tmp_path / f"rows{extension}"
    assert read_rows(write(path, ROWS)) == ROWS


@pytest.mark.parametrize("extension", [".csv", ".tsv", ".jsonl"])
def test_byte_order_mark_and_windows_lines(tmp_path, extension):
    path = write(tmp_path / f"rows{extension}", [{"text": "a", "label": "b"}])
    content = path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + content + b"\r\n\r\n")
    assert read_rows(path) == [{"text": "a", "label": "b"}]


def test_long_fields_leave_the_csv_modules_limit_as_it_was(tmp_path):
    before = csv.field_size_limit()
    long = "word " * 60_000
    assert read_rows(write(tmp_path / "long.csv", [{"text": long}])) == [{"text": long}]
    assert csv.field_size_limit() == before


def test_tsv_with_unbalanced_quotes_is_read_as_glue_writes_it(tmp_path):
    path = tmp_path / "glue.tsv"
    path.write_text('a\tb\n"Never closed\tx\nsay "so" he\ty\n')
    assert read_rows(path) == [{"a": '"Never closed', "b": "x"}, {"a": 'say "so" he', "b": "y"}]


def test_types_are_kept_where_the_file_has_them(tmp_path):
    rows = [{"text": "a", "label": 1}, {"text": None, "label": 2}]
    assert read_rows(write(tmp_path / "a.jsonl", rows)) == rows
    assert read_rows(write(tmp_path / "a.parquet", rows)) == rows


BROKEN = {
    "latin.csv": ("text\nok\ncaf\xe9\n".encode("latin-1"), "not UTF-8: byte 0xe9 in line 3"),
    "empty.csv": (b"", "is empty"),
    "empty.csv.gz": (gzip.compress(b""), "is empty"),
    "nothing.jsonl.gz": (b"", "is empty"),
    "header.csv": (b"text,label\n", "has no rows"),
    "blank.jsonl": (b"\n\n", "has no rows"),
    "plain.csv.gz": (b"text\na\n", "truncated or not gzip"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 50)[:-12], "truncated or not gzip"),
    "bad.jsonl": (b'{"text": "a"}\n\n{"text": \n', "line 3 is not JSON"),
    "deep.jsonl": (b"[" * 100_000, "line 1 is not JSON"),
    "list.jsonl": (b"[1]\n", "line 1 must be a JSON object, got list"),
    "more.csv": (b'a,b\n"1\n2",3\n4,5,6\n', "line 4 must have 2 fields, as in the header, got 3"),
    "less.tsv": (b"a\tb\n1\n", "line 2 must have 2 fields, as in the header, got 1"),
    "less_quoted.tsv": (b'a\tb\n"1"\n', "line 2 must have 2 fields"),
    "open.csv": (b'a,b\n"1,2\n3,4\n', "is malformed"),
    "twice.csv": (b"a,a\n1,2\n", "more than one column 'a'"),
    "not.parquet": (b"PAR1 and nothing else", "damaged or not parquet"),
    "rows.xlsx": (b"x", "ending in .csv, .tsv, .jsonl, .parquet"),
    "rows": (b"x", "got 'no extension'"),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_broken_files_are_one_clear_line(tmp_path, name):
    content, message = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(DataError, match="There is no file"):
        read_rows(tmp_path / "none.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        read_rows(tmp_path / "folder.csv")
    (tmp_path / "file.csv").write_text("a\n1\n")
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(tmp_path / "file.csv" / "inner.csv")


def test_what_nobody_needs_need_not_be_readable(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    unreadable = {
        "timestamp": pa.array([10**15, 2], pa.timestamp("s")),
        "date": pa.array([10**7, 2], pa.date32()),
        "duration": pa.array([10**18, 2], pa.duration("s")),
        "bytes": pa.array([b"\xff\xfe", b"ok"], pa.binary()).view(pa.utf8()),
    }
    pyarrow.parquet.write_table(pa.table({"text": ["a", "b"], **unreadable}), tmp_path / "a.parquet")
    source = Source(tmp_path / "a.parquet")
    assert [row["text"] for row in source.rows] == ["a", "b"]
    for name in unreadable:
        with pytest.raises(DataError, match=f"column '{name}' cannot be read"):
            source.check_columns("text", name)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"text;label\na;b\n", "separated by semicolons, not by commas as its name says"),
        ("a.tsv", b"text,label\na,b\n", "separated by commas, not by tabs as its name says"),
        (
            "a.csv",
            "text,label\ncafé,b\n".encode("latin-1"),
            "not UTF-8: byte 0xe9 in line 2, perhaps Windows-1252",
        ),
        ("a.csv", "text,label\na,b\n".encode("utf-16-le"), "zero bytes, as UTF-16 without a byte order mark"),
        ("a.csv", b"PK\x03\x04" + bytes(40), "is a zip archive, such as Excel writes"),
        ("a.csv", b"text,text,label\na,b,c\n", "more than one column 'text'"),
    ],
)
def test_encodings_and_separators_are_told(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_rows(tmp_path / name)


def test_utf_16_with_its_mark_and_spaces_around_names(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(" text , label\nä,b\n".encode("utf-16"))
    assert read_rows(tmp_path / "a.csv") == [{"text": "ä", "label": "b"}]


def test_quotes_that_would_swallow_lines_are_plain(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('text\tlabel\n"I like it\tpos\nhe said."\tneg\nother\tpos\n')
    rows = read_rows(tmp_path / "a.tsv")
    assert [row["label"] for row in rows] == ["pos", "neg", "pos"] and rows[0]["text"] == '"I like it'


@pytest.mark.parametrize(
    ("content", "words"), [(b"\xff\xfea", "is truncated"), (b"\xef\xbb\xbf", "has no rows")]
)
def test_little_more_than_a_mark(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_rows(tmp_path / "a.csv")
