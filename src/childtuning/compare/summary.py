"""The rows of a comparison's tables: the scores and costs of every method, and its comparison with the baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, median
from typing import Any

from childtuning.compare.plan import Choice
from childtuning.compare.records import Group, lower_is_better
from childtuning.compare.statistics import (
    Description,
    Paired,
    compare_paired,
    compare_stratified,
    describe,
    expected_best,
    holm,
)


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
        mean: mean of the tasks' means; ``None`` if one of them is, or if metrics have different directions.
        paired: the result of ``compare_stratified``; ``None`` for the baseline itself, if the baseline is missing, or
            if metrics have different directions.
        p_corrected: ``paired.p_permutation`` after Holm's correction over all averages that are returned together.
    """

    method: str
    train_size: int | None
    start: str | None
    tasks: tuple[str, ...]
    mean: float | None
    paired: Paired | None = None
    p_corrected: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready fields."""
        return {**asdict(self), "paired": None if self.paired is None else self.paired.to_dict()}


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
            averages.append(Average(method, train_size, start, tasks, *found))
    corrected = holm([None if one.paired is None else one.paired.p_permutation for one in averages])
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
