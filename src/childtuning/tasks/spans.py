"""Spans of BIO tags, and precision, recall and F1 of predicted spans."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from childtuning.tasks.metrics import ratio

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


def span_counts(predicted: Iterable[Sequence[str]], truth: Iterable[Sequence[str]]) -> np.ndarray:
    """Return for each sentence the number of correct, of predicted and of true spans, [sentences, 3].

    A span is correct if its type, first and last word are.

    Args:
        predicted, truth: the tags of each sentence.
    """
    both = [(spans_of(guess), spans_of(true)) for guess, true in zip(predicted, truth, strict=True)]
    return np.asarray([(len(said & there), len(said), len(there)) for said, there in both])


def span_ratio(metric: str, counts: np.ndarray) -> np.ndarray:
    """Return span_precision, span_recall or span_f1 of sums of `span_counts`, [..., 3]; 0 with denominator 0.

    Example:
        >>> span_ratio("span_f1", span_counts([["B-A", "B-B"]], [["B-A", "O"]])).tolist()
        [0.6666666666666666]
    """
    right, said, there = np.moveaxis(counts, -1, 0)
    if metric == "span_f1":
        return ratio(2 * right, said + there)
    return ratio(right, said if metric == "span_precision" else there)
