"""`compare`: set up a store for a comparison, and do its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from childtuning.experiments.comparison.choice import choose
from childtuning.experiments.comparison.design import Comparison
from childtuning.experiments.comparison.overlaps import overlap
from childtuning.experiments.comparison.plan import needed
from childtuning.experiments.comparison.processes import work_in_processes
from childtuning.experiments.comparison.records import Record, Recorded
from childtuning.experiments.comparison.store import Store
from childtuning.experiments.comparison.work import environment, plan, work

EXECUTORS = ("local", "ray")


def stored(path: str | Path) -> Comparison | None:
    """Return what a store is about; ``None`` where there is no store yet.

    Raises:
        ConfigError: it is something else.
    """
    if not Path(path).expanduser().exists():
        return None
    with Store.open(path) as store:
        before = store.comparison()
    return None if before is None else Comparison.from_dict(before)


def foreseen(path: str | Path, comparison: Comparison) -> list[Record]:
    """Return the runs that a comparison needs, as far as that can be said now; nothing is written.

    Args:
        path: the store; it need not be there yet.
        comparison: what is asked for.
    Returns:
        those that a store has as they are recorded in it, without learning curves.
    Raises:
        ConfigError: it is something else than a store.
    """
    path = Path(path).expanduser()
    if not path.exists():
        return list(comparison.first_runs)
    with Store.open(path) as store:
        timed = {run.id: run for run in store.records_in_brief()}
        return list(needed(comparison, store.known() | timed, store.folder_of))


def set_up(path: str | Path, comparison: Comparison, *, retry_failed: bool = False) -> None:
    """Make a store or open one again, with the runs that a comparison needs planned in it.

    Args:
        path: the store.
        comparison: what it is to be about; finished runs that are of no use for it are set aside, not lost.
        retry_failed: do failed runs again.
    Raises:
        ConfigError: the store cannot be used.
    """
    with Store.open(path, create=True) as store:
        store.set_comparison(comparison.to_dict(), environment())
        if retry_failed:
            store.retry_failed()
        plan(store, comparison)


def compare(
    path: str | Path,
    comparison: Comparison,
    *,
    executor: Literal["local", "ray"] = "local",
    jobs: int = 1,
) -> Recorded:
    """Do the runs that a store lacks, and return all of them.

    Args:
        path: the store, as ``set_up`` leaves it.
        comparison: what it is about.
        executor: this machine, or a Ray cluster; the results are the same.
        jobs: processes on this machine.
    Raises:
        ConfigError: the store or the executor cannot be used; what is recorded is safe.
    """
    with Store.open(path, create=True) as store:
        if executor == "ray":
            from childtuning.experiments.comparison.ray_cluster import work_on_ray

            work_on_ray(store, comparison)
        elif jobs > 1:
            work_in_processes(store, comparison, jobs)
        else:
            work(store, comparison)
        if comparison.overlaps:
            found = overlap(choose(store.records(), comparison.seeds_to_tune), store.folder_of)
            if found is not None:
                store.set_artifact("overlap", found)
        return store.read()
