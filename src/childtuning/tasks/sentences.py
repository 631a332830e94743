"""Sentences of tagged words, read from table files with lists and from CoNLL files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from childtuning.errors import DataError
from childtuning.tasks.delimited import BadRow
from childtuning.tasks.examples import rows_of
from childtuning.tasks.labels import class_name, is_missing
from childtuning.tasks.rows import Source
from childtuning.tasks.split import Split

_DOCUMENT = "-DOCSTART-"
_BIO = re.compile(r"O|[BI]-\S+")


@dataclass(frozen=True)
class Sentences(Split):
    """One split of sentences.

    Args:
        words: the words of each sentence, at least one.
        tags: one tag per word for each sentence, or None if unknown.
    Raises:
        DataError: when a sentence has no words, or the number of tags differs from the number of words.
    """

    words: list[list[str]]
    tags: list[list[str]] | None = None

    def __post_init__(self) -> None:
        if self.tags is not None and len(self.tags) != len(self.words):
            raise DataError(
                f"tags must have one entry per sentence, got {len(self.tags)} for {len(self.words)} sentences. "
                f"Pass lists of equal length."
            )
        for row, words in enumerate(self.words):
            if not words:
                raise DataError(f"sentence {row + 1} has no words. Drop it.")
            if self.tags is not None and len(self.tags[row]) != len(words):
                raise DataError(
                    f"sentence {row + 1} must have one tag per word, got {len(self.tags[row])} tags for "
                    f"{len(words)} words. Correct it."
                )

    def __len__(self) -> int:
        return len(self.words)

    @property
    def is_labelled(self) -> bool:
        """Whether there are tags."""
        return self.tags is not None

    @property
    def form(self) -> str:
        """Always "sentences"."""
        return "sentences"

    def contents(self) -> list[tuple[str, ...]]:
        """Return the words of each sentence."""
        return [tuple(words) for words in self.words]

    def classes(self) -> set[str]:
        """Return the tags that occur."""
        return {tag for tags in self.tags or () for tag in tags}

    def subset(self, indices: Iterable[int]) -> Sentences:
        """Return the sentences at `indices`, in that order."""
        rows = [int(index) for index in indices]
        return Sentences([self.words[row] for row in rows], rows_of(self.tags, rows))

    def shown(self, index: int) -> str:
        """Return the words, separated by spaces."""
        return " ".join(self.words[index])


def read_sentences(source: Source, words: str, tags: str | None) -> Sentences:
    """Read sentences from a table file whose cells are lists.

    Args:
        source: a jsonl or parquet file, optionally .gz.
        words, tags: columns; with tags=None, no tags are read.
    Raises:
        DataError: for a missing column, or a cell that is not a list of words or tags; names the row.
    """

    def read(cell: Any, labels: Any) -> tuple[list[str], list[str]]:
        sentence = _cells(cell, words)
        if tags is None:
            return sentence, []
        found = _cells(labels, tags)
        if any(is_missing(tag) for tag in found):
            raise BadRow(f"has an empty tag in column {tags!r}", "Fill it in, or drop the row.")
        if len(found) != len(sentence):
            fault = f"must have one tag per word, got {len(found)} tags for {len(sentence)} words"
            raise BadRow(fault, "Correct it.")
        return sentence, [class_name(tag) for tag in found]

    rows = source.each(read, words, tags)
    return Sentences([words for words, _ in rows], None if tags is None else [tags for _, tags in rows])


def _cells(value: Any, column: str) -> list[str]:
    if not isinstance(value, list):
        got = "nothing" if value is None else type(value).__name__
        raise BadRow(f"must have a list in column {column!r}, got {got}", 'Write ["a", "word"], for example.')
    for entry in value:
        if not isinstance(entry, (str, int, float)):
            raise BadRow(
                f"must have words in column {column!r}, got {type(entry).__name__} among them",
                "Write each as a string.",
            )
    if not value:
        raise BadRow(f"has an empty list in column {column!r}", "Drop the row.")
    return [str(entry).encode("utf-8", "replace").decode("utf-8") for entry in value]


def read_conll(source: Source, *, labelled: bool) -> Sentences:
    """Read sentences from a file with one word per line, its tag in the last column, and blank lines between sentences.

    Columns are separated by spaces or tabs. -DOCSTART- lines are skipped, and so are comments before a sentence: lines
    that begin with # and hold a "=".

    Args:
        source: the file, optionally .gz.
        labelled: whether to read tags.
    Raises:
        DataError: for a file without sentences, or a word without a tag; names the line.
    """
    words: list[list[str]] = [[]]
    tags: list[list[str]] = [[]]
    num_comments = 0
    _check_columns(source, labelled=labelled)
    for number, fields in enumerate(_lines(source.text), start=1):
        if not words[-1] and _is_comment(fields):
            num_comments += 1
            continue
        if not fields or fields[0] == _DOCUMENT:
            if words[-1]:
                words.append([])
                tags.append([])
            continue
        if labelled and len(fields) < 2:
            raise DataError(
                f"{source} line {number} must have a word and its tag, got only {fields[0]!r}. "
                f"Write the tag in the last column."
            )
        words[-1].append(fields[0])
        tags[-1].append(fields[-1])
    if not words[-1]:
        words.pop()
        tags.pop()
    if not words:
        raise DataError(f"{source} has no sentences. Pass a file with at least one word.")
    if num_comments:
        source.note(f"{num_comments} comments before sentences were left out")
    return Sentences(words, tags if labelled else None)


def _check_columns(source: Source, *, labelled: bool) -> None:
    """Refuse CoNLL-U, whose first column is a number, and, without labels, running text."""
    lines = list(islice(_lines(source.text), 400))
    rows = [fields for fields in lines if fields and fields[0] != _DOCUMENT and not _is_comment(fields)]
    if rows and all(len(row) >= 10 and re.fullmatch(r"\d+([-.]\d+)?", row[0]) for row in rows):
        raise DataError(
            f"{source} is CoNLL-U, with the word in the second of ten columns. Save the word first and the tag last."
        )
    sizes = {len(row) for row in rows}
    if not labelled and sizes != {1} and not looks_like_conll(source.text):
        if max(sizes, default=0) > 3:
            raise DataError(
                f"{source} has several words a line, and no tags. Write one word a line, and a blank line after each "
                "sentence."
            )
        source.note("the word is in the first column of each line")


def _lines(text: str) -> Iterator[list[str]]:
    """Yield the columns of each line; other spaces than these, as in 10 000, are of the words."""
    for line in text.split("\n"):
        yield [field for field in re.split("[ \t]+", line.removesuffix("\r")) if field]


def _is_comment(fields: list[str]) -> bool:
    return len(fields) > 1 and fields[0] == "#" and any("=" in field for field in fields[1:])


def looks_like_conll(text: str) -> bool:
    """Return whether a text has a word and a BIO tag on each line, judged by the first few hundred lines."""
    lines = list(islice(_lines(text), 400))
    filled = [fields for fields in lines if fields and fields[0] != _DOCUMENT and not _is_comment(fields)]
    return bool(filled) and all(len(fields) > 1 and _BIO.fullmatch(fields[-1]) for fields in filled)


def is_bio(tags: Iterable[str]) -> bool:
    """Return whether tags mark spans: all are "O", "B-…" or "I-…", and not all are "O"."""
    names = set(tags)
    return all(_BIO.fullmatch(name) for name in names) and bool(names - {"O"})
