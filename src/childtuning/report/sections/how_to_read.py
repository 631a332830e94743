"""Notes on what the numbers of the ranking mean, and what they cannot show."""

from __future__ import annotations

from childtuning.compare.statistics import power_limit
from childtuning.compare.summary import SIGNIFICANT
from childtuning.report import numbers
from childtuning.report.evidence import Evidence
from childtuning.report.markup import Markup, el


def how_to_read(evidence: Evidence) -> Markup:
    """Return the notes, collapsed."""
    items = [
        "Interval: Student's 95 % interval of the mean over seeds; none with fewer than three.",
        "Collapsed: no better than always predicting the most frequent answer of the training examples, or without "
        "a score. If a run has no score, its method has no mean.",
        *_tests(evidence),
        "Standard error of a score: √(p (1 − p) / n) for an accuracy p on n evaluation examples. More seeds do not "
        "make it smaller; more evaluation examples do.",
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
        "▲ and ▼: significantly better and worse than the baseline. Bold: significantly better than the baseline; or "
        "the baseline, if it is significantly better than every other method. Means that are equal as shown, or scores "
        "that are equal for every common seed, are a tie.",
    ]
    limit = power_limit(max(one.num for one in compared), num, SIGNIFICANT)
    return [*items, limit] if limit else items
