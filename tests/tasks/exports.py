"""Files as people export them: each a name, its bytes, and what is understood of it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from tests.tiny import WORDS


class Export(NamedTuple):
    """A file.

    Attributes:
        name: of the file.
        content_fn: returns its bytes.
        kind: the kind of task that it is read as; None if it is refused.
        told: words of the notes, or of the refusal, one line each.
        options: further options of the reader.
    """

    name: str
    content_fn: Callable[[], bytes]
    kind: str | None
    told: Sequence[str] = ()
    options: dict[str, str] = {}  # noqa: RUF012  # never changed


def text(index: int, num_words: int = 9) -> str:
    """A sentence of its own for each index."""
    return (
        " ".join(WORDS[(index * 7 + word * (index % 5 + 1)) % len(WORDS)] for word in range(num_words))
        + f" {index}"
    )


def delimited(header: Sequence[str], rows: Iterable[Sequence[Any]], mark: str = ",") -> str:
    """A csv file as a spreadsheet writes it."""
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=mark).writerows([header, *rows] if header else rows)
    return file.getvalue()


def lines(rows: Iterable[dict[str, Any]]) -> bytes:
    """A jsonl file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def workbook() -> bytes:
    """A workbook of two sheets."""
    import openpyxl

    book = openpyxl.Workbook()
    for row in [["Comment", "Rating"], *([text(i), 1 + i % 5] for i in range(60))]:
        book.worksheets[0].append(row)
    book.create_sheet("Notes")
    file = io.BytesIO()
    book.save(file)
    return file.getvalue()


def labelled(num_rows: int = 60, classes: Sequence[str] = ("bad", "good")) -> list[tuple[str, str]]:
    """Texts with classes in turn."""
    return [(text(i), classes[i % len(classes)]) for i in range(num_rows)]


def _ids_and_dates() -> list[list[Any]]:
    rows = enumerate(labelled(60, ("billing", "delivery", "other")))
    return [[f"{i:08x}", f"2024-05-{i % 28 + 1:02} 10:00:00", words, topic] for i, (words, topic) in rows]


def _languages() -> bytes:
    said = ["Très beau film, je l'ai adoré.", "Ein viel zu langer Film.", "この映画はとても長かったです。"]
    return delimited(
        ("text", "lang", "label"),
        [(f"{said[i % 3]} {i}", ("fr", "de", "ja")[i % 3], i % 2) for i in range(60)],
    ).encode()


_CHAT = [{"from": "human", "value": "Is the film good?"}, {"from": "gpt", "value": "It is great."}]
_ALPACA = {"instruction": "Say whether the film is good.", "input": "the plot was dull", "output": "bad"}
_COLUMNS = ["the text is column", "the label is column"]

EXPORTS = [
    Export(
        "semicolons.csv",
        lambda: delimited(("Text", "Label"), labelled(), ";").encode(),
        "classification",
        ["separated by semicolons"],
    ),
    Export(
        "utf16.csv",
        lambda: delimited(("text", "label"), labelled(), "\t").encode("utf-16"),
        "classification",
        ["separated by tabs"],
    ),
    Export(
        "cp1252.csv",
        lambda: delimited(("text", "label"), [(f"Café “{t}”", c) for t, c in labelled()]).encode("cp1252"),
        "classification",
        ["read as Windows-1252"],
    ),
    Export("book.xlsx", workbook, "classification", ["first of its 2 sheets", *_COLUMNS]),
    Export(
        "mark.csv", lambda: delimited(("text", "label"), labelled()).encode("utf-8-sig"), "classification"
    ),
    Export(
        "nested.jsonl",
        lambda: lines({"review": {"body": t}, "meta": {"stars": c}} for t, c in labelled(60, ("1", "5"))),
        "classification",
        options={"text": "review.body", "label": "meta.stars"},
    ),
    Export(
        "list.json",
        lambda: json.dumps({"data": [{"text": t, "category": c} for t, c in labelled()]}).encode(),
        "classification",
        ["its rows are the list 'data'", "the label is column 'category'"],
    ),
    Export(
        "alpaca.json",
        lambda: json.dumps([_ALPACA] * 20).encode(),
        "causal-lm",
        ["prompts are in 'instruction' and 'input'"],
    ),
    Export(
        "sharegpt.jsonl",
        lambda: lines([{"conversations": _CHAT}] * 20),
        "causal-lm",
        ["conversations are in column"],
    ),
    Export(
        "headerless.csv",
        lambda: delimited((), labelled()).encode(),
        None,
        ["seems to have no header: its first row is"],
    ),
    Export(
        "newlines.csv",
        lambda: delimited(("text", "label"), [(t.replace(" was ", "\n"), c) for t, c in labelled()]).encode(),
        "classification",
    ),
    Export(
        "ids_and_dates.csv",
        lambda: delimited(("id", "created", "message", "topic"), _ids_and_dates()).encode(),
        "classification",
        ["column 'message'", "column 'topic'"],
    ),
    Export(
        "rare.csv",
        lambda: delimited(("text", "label"), [*labelled(), ("once", "rare")]).encode(),
        "classification",
        ["none of the rare 'rare'"],
    ),
    Export(
        "imbalanced.csv",
        lambda: delimited(
            ("text", "label"), [(t, "bad" if i % 41 else "good") for i, (t, _) in enumerate(labelled(410))]
        ).encode(),
        "classification",
    ),
    Export(
        "one_class.csv",
        lambda: delimited(("text", "label"), [(t, "bad") for t, _ in labelled()]).encode(),
        None,
        ["needs at least two classes, got only 'bad'"],
    ),
    Export(
        "duplicates.csv", lambda: delimited(("text", "label"), labelled(10) * 6).encode(), "classification"
    ),
    Export(
        "missing.csv",
        lambda: delimited(
            ("text", "label"), [(t, "" if i in (7, 30) else c) for i, (t, c) in enumerate(labelled())]
        ).encode(),
        "classification",
        ["2 of 60 rows of missing.csv were left out: line 9 has no label in column 'label'"],
    ),
    Export("languages.csv", _languages, "classification"),
    Export(
        "long.csv",
        lambda: delimited(
            ("text", "label"), [(text(i, 2000), c) for i, (_, c) in enumerate(labelled(20))]
        ).encode(),
        "classification",
    ),
    Export(
        "many_classes.csv",
        lambda: delimited(("text", "intent"), labelled(6000, [f"intent {i}" for i in range(2000)])).encode(),
        "classification",
        ["the label is column 'intent'"],
    ),
]
