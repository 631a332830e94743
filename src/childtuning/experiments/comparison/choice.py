"""Which hyperparameters each method is reported with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from childtuning.experiments.comparison.direction import lower_is_better
from childtuning.experiments.comparison.records import Group, Record


@dataclass(frozen=True)
class Tried:
    """One set of hyperparameters.

    Attributes:
        point: by name.
        records: its finished runs, by seed.
        selection: mean of the score they are chosen by, over the seeds that every set was tried with; NaN if a run
            of them is missing, failed or has no score.
    """

    point: Mapping[str, Any]
    records: Sequence[Record]
    selection: float


@dataclass(frozen=True)
class Choice:
    """The runs that a method is reported with.

    Attributes:
        group: one method on one task, at one size.
        point: the hyperparameters that were best.
        records: the finished runs with them, by seed.
        tried: all sets, in the order in which they were planned.
    """

    group: Group
    point: Mapping[str, Any]
    records: Sequence[Record]
    tried: Sequence[Tried]

    @property
    def at_end(self) -> tuple[str, ...]:
        """The hyperparameters whose best value is the lowest or the highest that was tried: a better may lie beyond."""
        return tuple(name for name, value in self.point.items() if self._is_end(name, value))

    def _is_end(self, name: str, value: Any) -> bool:
        values = {one.point[name] for one in self.tried}
        numeric = all(isinstance(one, int | float) and not isinstance(one, bool) for one in values)
        return numeric and len(values) > 1 and value in (min(values), max(values))


def choose(records: Iterable[Record], tune_seeds: Sequence[int]) -> list[Choice]:
    """Choose the best hyperparameters of every group of runs.

    Args:
        records: of one comparison; those that are not done, or have failed, take no part.
        tune_seeds: the seeds that every set of hyperparameters is tried with.
    Returns:
        a choice for every group with a finished run, in order of appearance. Of equal sets the first wins.
    """
    groups: dict[Group, dict[tuple[Any, ...], list[Record]]] = {}
    for record in records:
        if record.state == "done":
            points = groups.setdefault(record.group, {})
            points.setdefault(tuple(record.point.items()), []).append(record)
    return [_choice(group, points, tune_seeds) for group, points in groups.items()]


def _choice(
    group: Group, points: Mapping[tuple[Any, ...], list[Record]], tune_seeds: Sequence[int]
) -> Choice:
    tried = []
    for point, runs in points.items():
        runs.sort(key=lambda record: record.seed)
        chosen_by = [record.selection for record in runs if record.seed in tune_seeds]
        all_there = len(chosen_by) == len(tune_seeds)
        tried.append(Tried(dict(point), tuple(runs), fmean(chosen_by) if all_there else math.nan))
    sign = -1 if lower_is_better(tried[0].records[0].metric) else 1
    best = max(tried, key=lambda one: -math.inf if math.isnan(one.selection) else sign * one.selection)
    return Choice(group, best.point, best.records, tuple(tried))
