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
from childtuning.runs.folder import METRICS
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

    first, chosen = _networks(comparison, known)
    yield from first
    for runs in chosen.values():
        yield from (run for run in runs if run.seed >= comparison.tune_seeds)
    for runs in chosen.values():
        for source in runs:
            yield from _heads(comparison, source, known, folder_of)


def without_folders(
    comparison: Comparison, known: Mapping[str, Record], folder_of: Callable[[str], Path], overlap: Any
) -> list[str]:
    """Return the finished runs that are to be repeated: their network or child is needed, and their folder is gone.

    Args:
        comparison: the comparison.
        known: id -> recorded run.
        folder_of: returns the folder of a run by id.
        overlap: what is recorded of the overlap of the children, or ``None``.
    """
    chosen = _networks(comparison, known)[1]
    wanted = [
        source
        for runs in chosen.values()
        for source in runs
        if any(head.state in ("planned", "running") for head in _heads(comparison, source, known, folder_of))
    ]
    overlapping = overlapping_runs(comparison, known)
    if not is_overlap_of(overlap, overlapping):
        wanted += overlapping
    lost = [run.id for run in wanted if run.state == "done" and not (folder_of(run.id) / METRICS).is_file()]
    return list(dict.fromkeys(lost))


def overlapping_runs(comparison: Comparison, known: Mapping[str, Record]) -> list[Record]:
    """Return the finished runs whose children are compared, by task; none where that is not asked for.

    They are those of the first seed, of the method that has a fixed child for most tasks, two at least.
    """
    by_method: dict[str, dict[str, Record]] = {}
    for group, runs in _networks(comparison, known)[1].items() if comparison.overlaps else ():
        result = runs[0].result or {}
        is_fixed = 0 < result.get("child_parameters", 0) < result.get("eligible_parameters", 0)
        if runs[0].state == "done" and is_fixed:
            by_method.setdefault(group.method, {}).setdefault(group.task, runs[0])
    most = max(by_method.values(), key=len, default={})
    return list(most.values()) if len(most) > 1 else []


def is_overlap_of(overlap: Any, runs: Sequence[Record]) -> bool:
    """Tell whether a recorded overlap is that of these runs; an earlier version did not record of which it is."""
    return overlap is not None and overlap.get("runs") in (None, [run.id for run in runs])


def _networks(
    comparison: Comparison, known: Mapping[str, Record]
) -> tuple[list[Record], dict[Group, list[Record]]]:
    """Return the runs that choose hyperparameters, and by group those with the chosen ones, where they are chosen."""
    first = [_recorded(run, known) for run in comparison.first_runs]
    by_group: dict[Group, list[Record]] = {}
    for run in first:
        by_group.setdefault(run.group, []).append(run)
    chosen: dict[Group, list[Record]] = {}
    for group in comparison.groups():
        runs = by_group[group]
        if any(run.state in ("planned", "running") for run in runs):
            continue
        for choice in choose(runs, comparison.seeds_to_tune, comparison.selection):
            others = range(comparison.tune_seeds, comparison.num_seeds)
            chosen[group] = [
                *choice.records,
                *(_recorded(comparison.run(group, seed, choice.point), known) for seed in others),
            ]
    return first, chosen


def _heads(
    comparison: Comparison,
    source: Record,
    known: Mapping[str, Record],
    folder_of: Callable[[str], Path],
) -> Iterator[Record]:
    """Yield the new heads that are trained on a finished run's network."""
    for target in comparison.transfer_to:
        if source.state == "done" and target != source.group.task:
            yield _recorded(comparison.transfer_run(source, target, folder_of(source.id)), known)


def _recorded(run: Record, known: Mapping[str, Record]) -> Record:
    found = known.get(run.id, run)
    return found if found.state == "done" else replace(found, config=run.config)


def num_runs(comparison: Comparison, known: Iterable[Record] = ()) -> int:
    """Return the total number of runs of a comparison, if none fails beside those that are known to have failed.

    Where every set of hyperparameters has failed with every seed, there are no further seeds and no heads.
    """
    states: dict[Group, set[str]] = {}
    for run in known:
        states.setdefault(run.group, set()).add(run.state)
    total = 0
    for group in comparison.groups():
        if states.get(group) == {"failed"}:
            total += len(comparison.points(group.method)) * comparison.tune_seeds
            continue
        others = comparison.num_seeds - comparison.tune_seeds
        total += len(comparison.points(group.method)) * comparison.tune_seeds + others
        targets = [target for target in comparison.transfer_to if target != group.task]
        total += len(targets) * comparison.num_seeds
    return total
