"""What a ranking says, in a sentence: the same on the page, under the tables, and on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from childtuning.compare.statistics import Paired
from childtuning.compare.summary import Average, Ranked, Row, Standing, best_first, significance
from childtuning.report import numbers


@dataclass(frozen=True)
class Finding:
    """The parts of a sentence.

    Attributes:
        methods: its subject.
        claim: what is said of them, up to the test.
        verdict: the outcome of the test; empty if there is none.
        is_clear: whether the difference is significant.
    """

    methods: Sequence[str]
    claim: str
    verdict: str = ""
    is_clear: bool = False

    def __str__(self) -> str:
        words = f"{numbers.listed(self.methods)} {self.claim}{self.verdict}."
        return words.removeprefix(" ").replace("\N{NO-BREAK SPACE}", " ")


def finding(rows: Sequence[Row] | Sequence[Average], standing: Standing, baseline: str | None) -> Finding:
    """Return the finding of one table.

    Args:
        rows: the methods of a setting, or their averages across tasks.
        standing: who of them is ahead.
        baseline: the method that they were compared with.
    """
    ranked: list[Row | Average] = sorted(rows, key=best_first)
    best = ranked[0]
    if best.mean is None:
        return Finding((), "no method has a score in every run")
    if all(isinstance(row, Row) and row.description.num_collapsed == row.description.num for row in rows):
        return Finding(
            (), "every run collapsed: none is better than always predicting the most frequent answer"
        )
    metric = (best.metric or "score") if isinstance(best, Row) else None
    value = numbers.score(best.mean)
    if isinstance(best, Row) and best.description.interval is not None and not standing.is_tie:
        value += " ({} … {})".format(*map(numbers.score, best.description.interval))
    mean = f"{metric or 'a mean of'} {value}"
    if len(rows) == 1:
        return Finding(standing.best, f"has {mean}")
    if standing.is_tie:
        claim = f"tie at {mean}"
        if baseline in standing.best:
            return Finding(standing.best, claim)
        tied = [row for row in ranked if row.method in standing.best]
        clear = [row.method for row in tied if significance(row) > 0]
        if clear and len(clear) < len(tied):
            return Finding(
                standing.best,
                claim,
                f"; of these {numbers.listed(clear)} is significantly better than {baseline}",
            )
        weakest = max(tied, key=lambda row: -1.0 if row.p_corrected is None else row.p_corrected)
        return _beside_baseline(standing.best, claim, weakest, baseline)
    is_clear = best.method in standing.clear
    claim = f"leads with {mean}" if is_clear else f"has the best {metric or 'mean'}, {value}"
    if best.method != baseline:
        return _beside_baseline(standing.best, claim, best, baseline)
    worse = "every other method is significantly worse"
    return Finding(
        standing.best, f"{claim}, the baseline; {worse if is_clear else 'none is significantly better'}"
    )


def _beside_baseline(methods: Sequence[str], claim: str, best: Ranked, baseline: str | None) -> Finding:
    paired: Paired | None = best.paired
    if paired is None:
        return Finding(methods, claim)
    if paired.difference is None:
        why = "a run has no score" if paired.num_nan else "no common seed"
        return Finding(methods, f"{claim}, not compared with {baseline}: {why}")
    direction = "above" if paired.difference > 0 else "below"
    claim += f", {numbers.score(abs(paired.difference))} {direction} {baseline}: "
    if best.p_corrected is None:
        return Finding(methods, f"{claim}one common seed is not enough for a test")
    p = numbers.p_value(best.p_corrected)
    p = f"p {p if p.startswith('<') else f'= {p}'}".replace(" ", "\N{NO-BREAK SPACE}")
    is_clear = significance(best) > 0
    return Finding(methods, claim, f"{'significant' if is_clear else 'no clear difference'}, {p}", is_clear)


def noise(eval_examples: int, standard_error: float | None) -> str:
    """Return the number of evaluation examples and the noise that they leave in one score."""
    text = numbers.counted(eval_examples, "evaluation example")
    if standard_error is None:
        return text
    return f"{text}, standard error of a score {numbers.score(standard_error)}"
