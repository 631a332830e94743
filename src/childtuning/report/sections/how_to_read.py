"""Notes on what the numbers of the ranking mean, and what they cannot show."""

from __future__ import annotations

from childtuning.report import numbers
from childtuning.report.evidence import SIGNIFICANT, Evidence
from childtuning.report.markup import Markup, el


def how_to_read(evidence: Evidence) -> Markup:
    """Return the notes, collapsed."""
    items = [
        "Interval: 95 % bootstrap interval of the mean over seeds, bias-corrected and accelerated. With few seeds it "
        "is too narrow.",
        "Collapsed: no better than always predicting the most frequent answer of the training examples, or without "
        "a score. If a run has no score, its method has no mean.",
        *_tests(evidence),
    ]
    if evidence.comparison.get("selection") == "reported":
        items.append(
            "Hyperparameters were chosen on the reported examples, as in the paper, so the scores are optimistic."
        )
    notes = el("ul", [el("li", item) for item in items])
    return el("details", el("summary", "How to read this"), notes, class_="note")


def _tests(evidence: Evidence) -> list[str]:
    compared = [row.paired for row in evidence.rows if row.paired is not None]
    if not compared:
        return []
    num = len(compared)
    items = [
        f"p: paired permutation test against {evidence.baseline} over common seeds, with Holm's correction for all "
        f"{numbers.counted(num, 'comparison')} on single tasks and, separately, for all averages across tasks. "
        f"“Better” and “worse” are differences with p < {SIGNIFICANT:g}.",
        "▲ and ▼: significantly better and worse than the baseline. Bold: the best mean.",
    ]
    smallest = min((one.smallest_p for one in compared if one.smallest_p is not None), default=None)
    if smallest is not None and smallest * num >= SIGNIFICANT:
        seeds = numbers.counted(max(one.num for one in compared), "common seed")
        items.append(
            f"With {seeds}, no p can be below {smallest:.2g} before the correction, or below "
            f"{min(1.0, smallest * num):.2g} after it for {numbers.counted(num, 'comparison')}: on a single task, "
            f"nothing could have been significant. Use more seeds or fewer methods to detect differences."
        )
    return items
