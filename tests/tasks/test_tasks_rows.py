"""Reading tables: every type round trips, and every broken file is one clear line."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from childtuning.errors import DataError
from childtuning.tasks.rows import FORMATS, Source

ROWS: list[dict[str, Any]] = [
    {"text": 'a "quoted", line\nand another', "label": "x"},
    {"text": "tab\there, ünïcode \u2028 and 数", "label": "y"},
    {"text": "", "label": "x"},
]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Every row of a file; a bad one is refused."""
    return Source(path, strict=True).rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as the path's extension says."""
    name = path.name.removesuffix(".gz")
    plain = path.with_name(name)
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), plain)
    elif name.endswith(".xlsx"):
        import openpyxl

        book = openpyxl.Workbook()
        for row in (list(rows[0]), *(list(row.values()) for row in rows)):
            book.worksheets[0].append(row)
        book.save(plain)
    elif name.endswith(".json"):
        plain.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
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
    read = read_rows(write(path, ROWS))
    assert [
        {name: cell or "" for name, cell in row.items()} for row in read
    ] == ROWS  # xlsx has no empty text


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
    "damaged.csv": (b"text\nna\xc3\xafve\ncaf\xc3\n", "neither UTF-8 nor Windows-1252: byte 0xc3 in line 3"),
    "cyrillic.csv": (
        "text\nпривет\n".encode("cp1251"),
        "neither UTF-8 nor Windows-1252: byte 0xef in line 2",
    ),
    "undefined.csv": (b"text\nok, then \x81\n", "neither UTF-8 nor Windows-1252: byte 0x81 in line 2"),
    "empty.csv": (b"", "is empty"),
    "empty.csv.gz": (gzip.compress(b""), "is empty"),
    "nothing.jsonl.gz": (b"", "is empty"),
    "header.csv": (b"text,label\n", "has no rows"),
    "blank.jsonl": (b"\n\n", "has no rows"),
    "plain.csv.gz": (b"text\na\n", "truncated or not gzip"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 50)[:-12], "truncated or not gzip"),
    "bad.jsonl": (b'{"text": "a"}\n\n{"text": \n', "line 3 is not JSON"),
    "deep.jsonl": (b"[" * 100_000, "is not JSON (RecursionError)"),
    "list.jsonl": (b'{"text": "a"}\n[1]\n', "line 2 must be a JSON object, got list"),
    "numbers.json": (b"[1]", "row 1 must be a JSON object, got int"),
    "cut.json": (b'[{"text": "a"},\n{"text"', "is not JSON (Expecting ':' delimiter in line 2)"),
    "two.json": (
        b'{"a": [{"text": "a"}], "b": [{"text": "a"}]}',
        "must hold one list of objects, got 2 of them: a, b",
    ),
    "none.json": (b'{"text": {"a": "b"}}', "must hold one list of objects, got dict"),
    "more.csv": (b'a,b\n"1\n2",3\n4,5,6\n', "line 4 has 3 fields, not 2. Quote fields"),
    "less.tsv": (b"a\tb\n1\n", "line 2 has 1 field, not 2"),
    "less_quoted.tsv": (b'a\tb\n"1"\n', "line 2 has 1 field, not 2"),
    "open.csv": (b'a,b\n"1,2\n3,4\n', "is malformed"),
    "twice.csv": (b"a,a\n1,2\n", "more than one column 'a'"),
    "not.parquet": (b"PAR1 and nothing else", "damaged or not parquet"),
    "rows.xlsx": (b"x", "damaged or not a workbook"),
    "rows.xls": (b"x", "ending in .csv, .tsv, .json, .jsonl, .parquet, .xlsx"),
    "both.csv": (b"a,b;c\n1,2;3\n", "separated by commas or semicolons: both fit every row"),
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
            source.column(name)


TEXT = "text{0}label\n“Très bien”{0}gut\n"


@pytest.mark.parametrize(
    ("name", "mark", "encoding", "notes"),
    [
        ("a.csv", ",", "utf-8", []),
        ("a.csv", ";", "utf-8", ["a.csv: its columns are separated by semicolons"]),
        ("a.csv", "\t", "utf-16", ["a.csv: its columns are separated by tabs"]),
        ("a.tsv", "|", "utf-8", ["a.tsv: its columns are separated by bars"]),
        ("a.tsv", ",", "utf-8-sig", ["a.tsv: its columns are separated by commas"]),
        ("a.csv", ",", "utf-16-le", ["a.csv: read as UTF-16 without a byte order mark"]),
        ("a.csv", ",", "utf-16-be", ["a.csv: read as UTF-16 without a byte order mark"]),
        (
            "a.csv",
            ",",
            "cp1252",
            ["a.csv: not UTF-8 (byte 0x93 in line 2), so read as Windows-1252; --encoding names another"],
        ),
    ],
)
def test_separator_and_encoding_are_found_and_told(
    tmp_path: Path, name: str, mark: str, encoding: str, notes: list[str]
) -> None:
    # UTF-16 without a mark is known by zero bytes on one side only, which typographic quotes do not change.
    (tmp_path / name).write_bytes(TEXT.format(mark).encode(encoding))
    source = Source(tmp_path / name, strict=True)
    assert source.rows == [{"text": "“Très bien”", "label": "gut"}]
    assert source.notes == notes


@pytest.mark.parametrize(
    ("first", "mark"), [("sep=;", ";"), ('"sep=|"', "|"), ("SEP=\t", "\t"), ("sep=,", ",")]
)
def test_a_first_line_names_the_separator(tmp_path: Path, first: str, mark: str) -> None:
    rows = [["text", "label"], ["good; or, bad", "1"], ["a|b", "0"], ["short"]]
    with open(tmp_path / "a.csv", "w", encoding="utf-8-sig", newline="") as file:
        file.write(f"{first}\r\n")
        csv.writer(file, delimiter=mark).writerows(rows)
    source = Source(tmp_path / "a.csv")
    assert source.rows == [{"text": "good; or, bad", "label": "1"}, {"text": "a|b", "label": "0"}]
    assert "line 5" in " ".join(source.notes)


def test_the_rows_decide_the_separator_where_the_header_has_two(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text, in short;label\ngood;1\nbad, very;0\n")
    assert read_rows(tmp_path / "a.csv")[1] == {"text, in short": "bad, very", "label": "0"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("text,label\na,b\n".encode("utf-16-le") + b"\0", "contains zero bytes"),
        (b"PK\x03\x04" + bytes(40), "is a zip archive, such as Excel writes"),
        (b"text,text,label\na,b,c\n", "more than one column 'text'"),
    ],
)
def test_what_is_no_table_is_told(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_rows(tmp_path / "a.csv")


def test_utf_16_with_its_mark_and_spaces_around_names(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(" text , label\nä,b\n".encode("utf-16"))
    assert read_rows(tmp_path / "a.csv") == [{"text": "ä", "label": "b"}]


def test_quotes_that_would_swallow_lines_are_plain(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('text\tlabel\n"I like it\tpos\nhe said."\tneg\nother\tpos\n')
    rows = read_rows(tmp_path / "a.tsv")
    assert [row["label"] for row in rows] == ["pos", "neg", "pos"] and rows[0]["text"] == '"I like it'


@pytest.mark.parametrize(
    ("content", "words"), [(b"\xff\xfea", "is truncated or damaged"), (b"\xef\xbb\xbf", "has no rows")]
)
def test_little_more_than_a_mark(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_rows(tmp_path / "a.csv")


def test_columns_without_a_name_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text;label;;\na;b;;\n")
    assert read_rows(tmp_path / "a.csv") == [{"text": "a", "label": "b"}]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.xlsx"])
def test_rows_of_empty_cells_are_skipped_unless_every_row_counts(tmp_path: Path, name: str) -> None:
    rows = [{"text": "x", "label": "y"}, {"text": "", "label": ""}, {"text": "z", "label": "y"}]
    path = write(tmp_path / name, rows)
    assert Source(path).rows == [rows[0], rows[2]]
    texts = [row["text"] or "" for row in read_rows(path)]  # what `predict` answers, line by line
    assert texts == ["x", "", "z"]


def test_a_workbook_of_several_sheets(tmp_path: Path) -> None:
    import openpyxl

    book = openpyxl.Workbook()
    for row in (["text", "label"], ["a", 1], [None, None], ["b", 2.5]):
        book.worksheets[0].append(row)
    book.create_sheet("Notes")
    book.save(tmp_path / "a.xlsx")
    source = Source(tmp_path / "a.xlsx")
    assert source.rows == [{"text": "a", "label": 1}, {"text": "b", "label": 2.5}]
    assert source.notes == ["a.xlsx: read the first of its 2 sheets, 'Sheet'; --sheet names another"]
    book["Notes"].append(["text"])
    book["Notes"].append(["a note"])
    book.save(tmp_path / "a.xlsx")
    named = Source(tmp_path / "a.xlsx", sheet="Notes")
    assert (named.rows, named.notes) == ([{"text": "a note"}], [])
    alone = Source(write(tmp_path / "b.xlsx", [{"text": "x", "label": "y"}]), sheet="Notes")
    assert alone.rows and "read its only sheet, 'Sheet': it has none named 'Notes'" in alone.notes[0]
    with pytest.raises(DataError, match="has no sheet 'Note'. Did you mean 'Notes'"):
        assert Source(tmp_path / "a.xlsx", sheet="Note").rows


def test_a_workbook_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"needs the package openpyxl, .* Run pip install openpyxl"):
        read_rows(tmp_path / "a.xlsx")


@pytest.mark.parametrize(
    ("name", "content", "notes"),
    [
        ("a.json", [{"review": {"body": "a"}, "meta": {"stars": 3}}], []),
        (
            "a.json",
            {"version": 1, "data": [{"review": {"body": "a"}, "meta": {"stars": 3}}]},
            ["the list 'data'"],
        ),
        ("a.jsonl", [{"review": {"body": "a"}, "meta": {"stars": 3}}], []),
    ],
)
def test_json_is_one_list_and_objects_are_columns(
    tmp_path: Path, name: str, content: Any, notes: list[str]
) -> None:
    (tmp_path / name).write_text(json.dumps(content, indent=2))
    source = Source(tmp_path / name)
    assert source.rows == [{"review.body": "a", "meta.stars": 3}]
    assert len(source.notes) == len(notes) and all(map(str.__contains__, source.notes, notes))


def test_json_with_an_object_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    source = Source(tmp_path / "a.json")
    assert [row["text"] for row in source.rows] == ["a", "b"]
    assert source.notes == ["a.json: read as one JSON object per line"]


def rows_with_faults(path: Path, num_rows: int, faults: list[str]) -> Path:
    path.write_text("\n".join(["text,label", *(["some words,x"] * num_rows), *faults, ""]))
    return path


def test_few_bad_rows_are_left_out_and_told(tmp_path: Path) -> None:
    path = rows_with_faults(tmp_path / "a.csv", 97, ["a,b,c", "text,label", "a"])
    source = Source(path)
    assert len(source.rows) == 97
    assert source.notes == [
        "3 of 100 rows of a.csv were left out: line 99 has 3 fields, not 2; line 100 repeats the header; "
        "line 101 has 1 field, not 2"
    ]
    with pytest.raises(DataError, match="a.csv line 99 has 3 fields, not 2"):
        read_rows(path)


@pytest.mark.parametrize(
    ("num_rows", "num_bad", "refused"),
    [(1, 1, False), (0, 1, True), (5, 2, True), (95, 5, False), (94, 6, True)],
)
def test_one_row_in_twenty_may_be_bad(tmp_path: Path, num_rows: int, num_bad: int, refused: bool) -> None:
    source = Source(rows_with_faults(tmp_path / "a.csv", num_rows, ["a"] * num_bad))
    if refused:
        with pytest.raises(DataError, match="has 1 field, not 2"):
            source.rows  # noqa: B018
    else:
        assert len(source.rows) == num_rows


def test_an_encoding_is_used_where_a_file_is_not_utf_8(tmp_path: Path) -> None:
    russian = "text,label\nхорошо,1\nплохо,0\n"
    for encoding in ("cp1251", "utf-8", "utf-16"):
        (tmp_path / "a.csv").write_bytes(russian.encode(encoding))
        source = Source(tmp_path / "a.csv", encoding="cp1251")
        assert [row["text"] for row in source.rows] == ["хорошо", "плохо"] and source.notes == []
    (tmp_path / "a.csv").write_bytes(russian.encode("cp1251"))
    with pytest.raises(DataError, match=r"Name its --encoding, or save it as UTF-8\."):
        read_rows(tmp_path / "a.csv")
    with pytest.raises(DataError, match="a.csv is not ascii. Pass another --encoding"):
        assert Source(tmp_path / "a.csv", encoding="ascii").rows


@pytest.mark.parametrize("encoding", ["utf-32", "utf-16-le", "utf-7"])
def test_an_encoding_that_is_no_superset_of_ascii_is_used_as_named(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.csv").write_bytes("text,label\n非常好 + 非常好,1\n".encode(encoding))
    assert Source(tmp_path / "a.csv", encoding=encoding).rows == [{"text": "非常好 + 非常好", "label": "1"}]


def test_columns_as_pandas_writes_them(tmp_path: Path) -> None:
    import pandas

    rows = [{"text": "one", "label": "x"}, {"text": "two", "label": "y"}]
    table = pandas.DataFrame(rows, index=[4, 7])
    for orient in ("columns", "records", "table"):
        table.to_json(tmp_path / "a.json", orient=orient)
        found = Source(tmp_path / "a.json")
        assert [{name: row[name] for name in rows[0]} for row in found.rows] == rows, orient


def test_one_object_on_one_line_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"text": "a", "label": 1}')
    source = Source(path)
    assert source.rows == [{"text": "a", "label": 1}] and "read as one row" in " ".join(source.notes)
