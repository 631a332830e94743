"""Which runs a comparison needs, given those that are finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from childtuning.experiments.comparison.choice import choose
from childtuning.experiments.comparison.design import Comparison
from childtuning.experiments.comparison.records import Group, Record


def needed(
    comparison: Comparison, known: Mapping[str, Record], folder_of: Callable[[str], Path]
) -> Iterator[Record]:
    """Yield the runs that are needed as far as that can be said now; a pure function of what is recorded.

    First every set of hyperparameters with the seeds that tune. Once those of a method on a task are done (or failed),
    its best set gets the other seeds; and a finished run, the new heads on its network.

    Args:
        comparison: what is asked for.
        known: the recorded runs, by id.
        folder_of: the folder of a run, by id.
    Yields:
        each run once; those that are recorded, as they are recorded.
    """
    first: dict[Group, list[Record]] = {}
    for run in comparison.first_runs:
        found = known.get(run.id, run)
        first.setdefault(run.group, []).append(found)
        yield found
    chosen: dict[Group, list[Record]] = {}
    for group in comparison.groups():
        runs = first[group]
        if any(run.state in ("planned", "running") for run in runs):
            continue
        for choice in choose(runs, comparison.seeds_to_tune):
            chosen[group] = list(choice.records)
            for seed in range(comparison.tune_seeds, comparison.num_seeds):
                run = comparison.run(group, seed, choice.point)
                found = known.get(run.id, run)
                chosen[group].append(found)
                yield found
    for runs in chosen.values():
        for source in runs:
            if source.state == "done":
                for target in comparison.transfer_to:
                    if target != source.group.task:
                        run = comparison.transfer_run(source, target, folder_of(source.id))
                        yield known.get(run.id, run)


def num_runs(comparison: Comparison) -> int:
    """Return how many runs a comparison comes to, if none fails."""
    total = 0
    for group in comparison.groups():
        others = comparison.num_seeds - comparison.tune_seeds
        total += len(comparison.points(group.method)) * comparison.tune_seeds + others
        targets = [target for target in comparison.transfer_to if target != group.task]
        total += len(targets) * comparison.num_seeds
    return total
