"""What the numbers of the ranking mean, and what they cannot show."""

from __future__ import annotations

from childtuning.report import numbers
from childtuning.report.evidence import SIGNIFICANT, Evidence
from childtuning.report.markup import Markup, el


def how_to_read(evidence: Evidence) -> Markup:
    """Return the notes, folded."""
    items = [
        "Interval: 95 % bootstrap interval of the mean over seeds, bias-corrected and accelerated. With few seeds it "
        "is narrower than it should be.",
        "Collapsed: no better than always giving the most frequent answer of the training examples, or without a "
        "score. A method of which a run has no score has no mean.",
        *_tests(evidence),
    ]
    if evidence.comparison.get("selection") == "reported":
        items.append(
            "Hyperparameters were chosen on the reported examples, as the paper does, so scores are optimistic."
        )
    notes = el("ul", [el("li", item) for item in items])
    return el("details", el("summary", "How to read this"), notes, class_="note")


def _tests(evidence: Evidence) -> list[str]:
    compared = [row.paired for row in evidence.rows if row.paired is not None]
    if not compared:
        return []
    num = len(compared)
    items = [
        f"p: of a paired permutation test against {evidence.baseline} over common seeds, with Holm's correction for "
        f"all {numbers.counted(num, 'comparison')} on single tasks, and apart from these for all averages across "
        f"tasks. “Better” and “worse” are differences with p < {SIGNIFICANT:g}.",
        "▲ and ▼: significantly better and worse than the baseline. Bold: the best mean.",
    ]
    smallest = min((one.smallest_p for one in compared if one.smallest_p is not None), default=None)
    if smallest is not None and smallest * num >= SIGNIFICANT:
        seeds = numbers.counted(max(one.num for one in compared), "common seed")
        items.append(
            f"With {seeds} no p can be below {smallest:.2g} before the correction, nor below "
            f"{min(1.0, smallest * num):.2g} after it where {num} are compared: on a single task nothing here could "
            f"have been significant. More seeds or fewer methods would tell more."
        )
    return items
