"""The runs that a comparison needs, and the choice of hyperparameters from finished runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from childtuning.compare.design import Comparison
from childtuning.compare.records import Group, Record
from childtuning.tasks.metrics import lower_is_better


@dataclass(frozen=True)
class Tried:
    """One set of hyperparameters.

    Attributes:
        point: name -> value.
        records: its finished runs, by seed; none if all have failed.
        selection: mean of the selection score over the tuning seeds; NaN if one of these runs is missing, failed or
            has no score.
    """

    point: Mapping[str, Any]
    records: Sequence[Record]
    selection: float


@dataclass(frozen=True)
class Choice:
    """The chosen hyperparameters of a group and their runs, which are reported.

    Attributes:
        group: one method on one task, at one size.
        point: the best hyperparameters.
        records: the finished runs with them, by seed.
        tried: all sets, in the order of planning.
    """

    group: Group
    point: Mapping[str, Any]
    records: Sequence[Record]
    tried: Sequence[Tried]

    @property
    def at_end(self) -> tuple[str, ...]:
        """The hyperparameters whose best value is the lowest or highest tried, so that a better one may lie beyond."""
        return tuple(name for name, value in self.point.items() if self._is_end(name, value))

    def _is_end(self, name: str, value: Any) -> bool:
        values = {one.point[name] for one in self.tried if name in one.point}
        numeric = all(isinstance(one, int | float) and not isinstance(one, bool) for one in values)
        return numeric and len(values) > 1 and value in (min(values), max(values))


def choose(records: Iterable[Record], tune_seeds: Sequence[int], selection: str = "held-out") -> list[Choice]:
    """Choose the best hyperparameters of every group of runs.

    Args:
        records: the runs of one comparison; unfinished ones are ignored, and what failed is not chosen.
        tune_seeds: the seeds with which every set of hyperparameters is tried.
        selection: ``held-out``: by the held-out examples where there are any; ``reported``: by the reported ones.
    Returns:
        a choice for every group with a finished run, in order of appearance. Ties go to the first set.
    """
    groups: dict[Group, dict[tuple[Any, ...], list[Record]]] = {}
    for record in records:
        if record.state in ("done", "failed"):
            points = groups.setdefault(record.group, {})
            runs = points.setdefault(tuple(record.point.items()), [])
            runs += [record] if record.state == "done" else []
    return [
        _choice(group, points, tune_seeds, selection)
        for group, points in groups.items()
        if any(points.values())
    ]


def _choice(
    group: Group,
    points: Mapping[tuple[Any, ...], list[Record]],
    tune_seeds: Sequence[int],
    selection: str,
) -> Choice:
    tried = []
    for point, runs in points.items():
        runs.sort(key=lambda record: record.seed)
        tuning = [record for record in runs if record.seed in tune_seeds]
        chosen_by = [record.score if selection == "reported" else record.selection for record in tuning]
        all_there = len(chosen_by) == len(tune_seeds)
        tried.append(Tried(dict(point), tuple(runs), fmean(chosen_by) if all_there else math.nan))
    finished = [one for one in tried if one.records]
    sign = -1 if lower_is_better(finished[0].records[0].metric) else 1
    best = max(finished, key=lambda one: -math.inf if math.isnan(one.selection) else sign * one.selection)
    return Choice(group, best.point, best.records, tuple(tried))


def needed(
    comparison: Comparison, known: Mapping[str, Record], folder_of: Callable[[str], Path]
) -> Iterator[Record]:
    """Yield the runs that are needed, as far as they are known; a pure function of the recorded runs.

    First every set of hyperparameters is run with the tuning seeds. Once these runs of a method on a task are done (or
    failed), its best set is run with the other seeds. For each finished run, new heads are then trained on its network.

    Args:
        comparison: the comparison.
        known: id -> recorded run.
        folder_of: returns the folder of a run by id.
    Yields:
        each run once; finished runs as recorded.
    """

    def recorded(run: Record) -> Record:
        found = known.get(run.id, run)
        return found if found.state == "done" else replace(found, config=run.config)

    first: dict[Group, list[Record]] = {}
    for run in comparison.first_runs:
        found = recorded(run)
        first.setdefault(run.group, []).append(found)
        yield found
    chosen: dict[Group, list[Record]] = {}
    for group in comparison.groups():
        runs = first[group]
        if any(run.state in ("planned", "running") for run in runs):
            continue
        for choice in choose(runs, comparison.seeds_to_tune, comparison.selection):
            chosen[group] = list(choice.records)
            for seed in range(comparison.tune_seeds, comparison.num_seeds):
                run = comparison.run(group, seed, choice.point)
                found = recorded(run)
                chosen[group].append(found)
                yield found
    for runs in chosen.values():
        for source in runs:
            if source.state == "done":
                for target in comparison.transfer_to:
                    if target != source.group.task:
                        run = comparison.transfer_run(source, target, folder_of(source.id))
                        yield recorded(run)


def num_runs(comparison: Comparison) -> int:
    """Return the total number of runs of a comparison, if none fails."""
    total = 0
    for group in comparison.groups():
        others = comparison.num_seeds - comparison.tune_seeds
        total += len(comparison.points(group.method)) * comparison.tune_seeds + others
        targets = [target for target in comparison.transfer_to if target != group.task]
        total += len(targets) * comparison.num_seeds
    return total
