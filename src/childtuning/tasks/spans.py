"""Spans of BIO tags, and precision, recall and F1 of predicted spans."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Span = tuple[str, int, int]


def spans_of(tags: Sequence[str]) -> set[Span]:
    """Return the spans that a sentence's tags mark, as (type, first word, word after the last).

    "B-X" begins a span. "I-X" continues a span of type X, or begins one if there is none. This reads both
    BIO and the older IOB scheme, where "B-" is used only between adjacent spans of the same type.
    [Tjong Kim Sang and De Meulder 2003, arXiv:cs/0306050]

    Example:
        >>> sorted(spans_of(["B-LOC", "I-LOC", "B-LOC", "O", "I-PER"]))
        [('LOC', 0, 2), ('LOC', 2, 3), ('PER', 4, 5)]
    """
    found: set[Span] = set()
    kind, start = "", 0
    for position, tag in enumerate((*tags, "O")):
        mark, _, name = tag.partition("-")
        if kind and (mark != "I" or name != kind):
            found.add((kind, start, position))
            kind = ""
        if mark in ("B", "I") and name and not kind:
            kind, start = name, position
    return found


def span_scores(predicted: Iterable[Sequence[str]], truth: Iterable[Sequence[str]]) -> dict[str, float]:
    """Return precision, recall and F1 of exact spans, over all sentences together.

    A span is correct if its type, first and last word are. A ratio with denominator 0 is 0.

    Args:
        predicted, truth: the tags of each sentence.
    Example:
        >>> span_scores([["B-A", "B-B"]], [["B-A", "O"]])["span_f1"]
        0.6666666666666666
    """
    right = said = there = 0
    for guess, true in zip(predicted, truth, strict=True):
        guessed, actual = spans_of(guess), spans_of(true)
        right += len(guessed & actual)
        said += len(guessed)
        there += len(actual)
    return {
        "span_f1": 2 * right / (said + there) if said + there else 0.0,
        "span_precision": right / said if said else 0.0,
        "span_recall": right / there if there else 0.0,
    }
