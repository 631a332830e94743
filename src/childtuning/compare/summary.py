"""The rows of a comparison's tables: the scores and costs of every method, and its comparison with the baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, median
from typing import Any, Protocol

from childtuning.compare.plan import Choice
from childtuning.compare.records import Group
from childtuning.compare.statistics import (
    Description,
    Paired,
    compare_paired,
    compare_stratified,
    describe,
    expected_best,
    holm,
)
from childtuning.tasks.metrics import lower_is_better

SIGNIFICANT = 0.05
SHOWN_DIGITS = 3  # decimals of a score in tables; means that are equal with so many are a tie


@dataclass(frozen=True)
class Costs:
    """The costs of a run: medians over the seeds.

    Attributes:
        trained_parameters: the number of trained entries, including the new head.
        state_bytes: the optimizer's memory.
        delta_bytes: size of the saved delta.
        peak_memory_bytes: as in ``RunResult``.
        seconds: wall time of the Fisher pass and training together.
    """

    trained_parameters: int
    state_bytes: int
    delta_bytes: int
    peak_memory_bytes: int
    seconds: float


@dataclass(frozen=True)
class Row:
    """One method on one task, at one size.

    Attributes:
        group: the method, task and size.
        metric: name of the task's main metric.
        point: the chosen hyperparameters.
        at_end: those whose value is the lowest or highest of several that were tried.
        scores: seed -> score on the reported examples; NaN for a run without one.
        description: statistics of the scores.
        costs: costs of the reported runs.
        expected_best: expected selection score of the best of k = 1 … n sets of hyperparameters.
        paired: comparison with the baseline; ``None`` for the baseline itself and if it has no finished run.
        p_corrected: ``paired.p_permutation`` after Holm's correction.
    """

    group: Group
    metric: str | None
    point: Mapping[str, Any]
    at_end: tuple[str, ...]
    scores: Mapping[int, float]
    description: Description
    costs: Costs
    expected_best: Sequence[float]
    paired: Paired | None = None
    p_corrected: float | None = None

    @property
    def method(self) -> str:
        """The method as typed."""
        return self.group.method

    @property
    def mean(self) -> float | None:
        """Mean of the scores; ``None`` if a run has none."""
        return self.description.mean

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready fields: NaN is null, and seeds are strings."""
        return {
            **asdict(self),
            "scores": {str(seed): _number(score) for seed, score in self.scores.items()},
            "expected_best": [_number(score) for score in self.expected_best],
            "paired": None if self.paired is None else self.paired.to_dict(),
        }


@dataclass(frozen=True)
class Average:
    """One method over several tasks.

    Attributes:
        method: with its options, as typed.
        train_size, start: as in ``Group``; methods are averaged separately for each.
        tasks: the tasks that every method has.
        metric: the main metric of the first of them.
        mean: mean of the tasks' means; ``None`` if one of them is, or if metrics have different directions.
        paired: the result of ``compare_stratified``; ``None`` for the baseline itself, if the baseline is missing, or
            if metrics have different directions.
        p_corrected: ``paired.p_permutation`` after Holm's correction over all averages that are returned together.
    """

    method: str
    train_size: int | None
    start: str | None
    tasks: tuple[str, ...]
    metric: str | None
    mean: float | None
    paired: Paired | None = None
    p_corrected: float | None = None

    @property
    def scores(self) -> Mapping[int, float]:
        """None: the scores of different tasks are not compared one by one."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready fields."""
        return {**asdict(self), "paired": None if self.paired is None else self.paired.to_dict()}


class Ranked(Protocol):
    """What a ranking needs of a method: a ``Row``, or an ``Average``."""

    @property
    def method(self) -> str: ...
    @property
    def metric(self) -> str | None: ...
    @property
    def mean(self) -> float | None: ...
    @property
    def scores(self) -> Mapping[int, float]: ...
    @property
    def paired(self) -> Paired | None: ...
    @property
    def p_corrected(self) -> float | None: ...


def significance(one: Ranked) -> int:
    """Return +1 or -1 if a method is better or worse than the baseline at 5 % after Holm's correction, else 0."""
    paired, p = one.paired, one.p_corrected
    if paired is None or p is None or p >= SIGNIFICANT or not paired.difference:
        return 0
    return 1 if (paired.difference > 0) != lower_is_better(one.metric) else -1


def best_first(one: Ranked) -> tuple[bool, float]:
    """Return the key that sorts methods by their means; those without one come last."""
    if one.mean is None:
        return True, 0.0
    return False, one.mean if lower_is_better(one.metric) else -one.mean


@dataclass(frozen=True)
class Standing:
    """Who is ahead in a ranking, and whose place is beyond doubt.

    Attributes:
        best: the method with the best mean, and those that tie with it: their means are equal as shown, or their
            scores are equal for every seed. Empty if no method has a mean.
        clear: the methods that are significantly better than all that they are compared with: the baseline; or, for
            the baseline, every other method. Only these may be said to lead, and are bold in tables.
    """

    best: tuple[str, ...]
    clear: frozenset[str]

    @property
    def is_tie(self) -> bool:
        """Whether several methods are the best."""
        return len(self.best) > 1

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready fields."""
        return {"best": list(self.best), "tie": self.is_tie, "clear": sorted(self.clear)}


def standing(rows: Sequence[Ranked], baseline: str | None) -> Standing:
    """Return who is ahead.

    Args:
        rows: the methods of one table, in any order.
        baseline: the method that they were compared with.
    """
    ranked = sorted((row for row in rows if row.mean is not None), key=best_first)
    best = [row.method for row in ranked if _tie(ranked[0], row)]
    signs = {row.method: significance(row) for row in rows}
    clear = {method for method, sign in signs.items() if sign > 0}
    others = [sign for method, sign in signs.items() if method != baseline]
    if baseline in signs and others and all(sign < 0 for sign in others):
        clear.add(baseline)
    if baseline in best and len(best) > 1:
        clear.difference_update(best)
    return Standing(tuple(best), frozenset(clear))


def _tie(one: Ranked, other: Ranked) -> bool:
    same = bool(one.scores) and one.scores == other.scores
    return same or _shown(one.mean) == _shown(other.mean)


def _shown(mean: float | None) -> float | None:
    return None if mean is None else round(mean, SHOWN_DIGITS)


def standard_error(metric: str | None, score: float | None, num_examples: int) -> float | None:
    """Return the standard error of an accuracy on so many independent examples: √(p (1 − p) / n).

    It is the noise of the evaluation examples, which more seeds do not reduce. ``None`` for metrics that are no share
    of the examples, and at 0 and 1, where the examples do not tell it.
    """
    if metric != "accuracy" or score is None or not num_examples or not 0 < score < 1:
        return None
    return math.sqrt(score * (1 - score) / num_examples)


def summarize(choices: Sequence[Choice], baseline: str | None) -> list[Row]:
    """Return a row for every choice.

    A method is compared with the baseline of the same task, size and start, over the seeds that both have. The family
    of Holm's correction consists of all comparisons in the returned rows, over all tasks, sizes and starts: the
    probability of any false positive in the table is at most α. Comparisons without a p are not counted.

    Args:
        choices: the choices of one table.
        baseline: a method as typed, or ``None`` for no comparison.
    """
    rows = [_row(choice) for choice in choices]
    baselines = {_place(row.group): row for row in rows if row.group.method == baseline}
    compared = [_beside(row, baselines.get(_place(row.group))) for row in rows]
    corrected = holm([None if row.paired is None else row.paired.p_permutation for row in compared])
    return [replace(row, p_corrected=p) for row, p in zip(compared, corrected, strict=True)]


def across_tasks(rows: Sequence[Row], baseline: str | None) -> list[Average]:
    """Return the mean of each method's task means, over the tasks that every method has, for every size and start.

    Different metrics are averaged without scaling, as papers do.

    Args:
        rows: as ``summarize`` returns them.
        baseline: a method as typed, or ``None`` for no comparison.
    """
    tables: dict[tuple[int | None, str | None], dict[str, dict[str, Row]]] = {}
    for row in rows:
        methods = tables.setdefault((row.group.train_size, row.group.start), {})
        methods.setdefault(row.group.method, {})[row.group.task] = row
    averages = []
    for (train_size, start), methods in tables.items():
        everywhere = set.intersection(*(set(by_task) for by_task in methods.values()))
        tasks = tuple(task for task in next(iter(methods.values())) if task in everywhere)
        for method, by_task in methods.items():
            beside = methods.get(baseline) if baseline is not None and baseline != method else None
            found = _average(
                [by_task[task] for task in tasks],
                None if beside is None else [beside[task] for task in tasks],
            )
            metric = by_task[tasks[0]].metric if tasks else None
            averages.append(Average(method, train_size, start, tasks, metric, *found))
    # The mean over one task is its own row's, which is corrected there.
    of_several = [one.paired if len(one.tasks) > 1 else None for one in averages]
    corrected = holm([None if paired is None else paired.p_permutation for paired in of_several])
    return [replace(one, p_corrected=p) for one, p in zip(averages, corrected, strict=True)]


def _row(choice: Choice) -> Row:
    records = choice.records
    metric = next((record.metric for record in records if record.metric is not None), None)
    lower = lower_is_better(metric)
    return Row(
        group=choice.group,
        metric=metric,
        point=choice.point,
        at_end=choice.at_end,
        scores={record.seed: record.score for record in records},
        description=describe(
            [record.score for record in records],
            [record.collapsed for record in records],
            lower_is_better=lower,
        ),
        costs=_costs([record.result for record in records if record.result is not None]),
        expected_best=expected_best([tried.selection for tried in choice.tried], lower_is_better=lower),
    )


def _costs(results: Sequence[Mapping[str, Any]]) -> Costs:
    def middle(name: str) -> int:
        return round(median(result[name] for result in results))

    return Costs(
        trained_parameters=middle("trained_parameters"),
        state_bytes=middle("state_bytes"),
        delta_bytes=middle("delta_bytes"),
        peak_memory_bytes=middle("peak_memory_bytes"),
        seconds=median(result["fisher_seconds"] + result["train_seconds"] for result in results),
    )


def _place(group: Group) -> tuple[str, int | None, str | None]:
    return group.task, group.train_size, group.start


def _beside(row: Row, baseline: Row | None) -> Row:
    if baseline is None or baseline is row:
        return row
    paired = compare_paired(row.scores, baseline.scores, lower_is_better=lower_is_better(row.metric))
    return replace(row, paired=paired)


def _average(rows: Sequence[Row], baseline_rows: Sequence[Row] | None) -> tuple[float | None, Paired | None]:
    means = [row.description.mean for row in rows]
    if not rows or len({lower_is_better(row.metric) for row in rows}) > 1:
        return None, None
    paired = None
    if baseline_rows is not None:
        paired = compare_stratified(
            [(row.scores, beside.scores) for row, beside in zip(rows, baseline_rows, strict=True)]
        )
    known = [mean for mean in means if mean is not None]
    return (fmean(known) if len(known) == len(means) else None), paired


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
