"""Set up a store for a comparison, and execute its runs: in this process, in several, or on a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

from childtuning.compare.design import Comparison, combination_of
from childtuning.compare.files import Owner
from childtuning.compare.overlaps import CHILD, overlap
from childtuning.compare.plan import needed, overlapping_runs, without_folders
from childtuning.compare.records import Record, Recorded
from childtuning.compare.store import Store
from childtuning.compare.work import end_with_parent, environment, execute, plan, same_as, work
from childtuning.errors import ChildTuningError, ConfigError, counted
from childtuning.runs.inputs import Inputs

EXECUTORS = ("local", "ray")


def stored(path: str | Path) -> Comparison | None:
    """Return the comparison of a store; ``None`` if there is no store yet.

    Raises:
        ConfigError: when the file is not a store.
    """
    if not Path(path).expanduser().exists():
        return None
    with Store.open(path) as store:
        before = store.comparison()
    return None if before is None else Comparison.from_dict(before)


def foreseen(path: str | Path, comparison: Comparison) -> list[Record]:
    """Return the runs that a comparison needs, as far as they are known; nothing is written.

    Args:
        path: the store; it need not exist.
        comparison: the comparison.
    Returns:
        the runs; those in the store are returned as recorded, without learning curves.
    Raises:
        ConfigError: when the file is not a store.
    """
    path = Path(path).expanduser()
    if not path.exists():
        return list(comparison.first_runs)
    with Store.open(path) as store:
        known = store.known() | {run.id: run for run in store.records_in_brief()}
        for run_id in without_folders(comparison, known, store.folder_of, store.artifact("overlap")):
            known[run_id] = replace(known[run_id], state="planned")
        return list(needed(comparison, known, store.folder_of))


def check_installed(comparison: Comparison) -> None:
    """Raise a ConfigError if a package that one of the methods needs is missing."""
    for method in comparison.methods:
        for one in combination_of(method).methods:
            one.check_installed()


def set_up(path: str | Path, comparison: Comparison, *, retry_failed: bool = False) -> list[str]:
    """Create or open a store and plan the runs that a comparison needs.

    Args:
        path: the store.
        comparison: the comparison; finished runs that it does not need are set aside, not deleted.
        retry_failed: repeat failed runs.
    Returns:
        lines for the user: what is repeated, and what was set aside.
    Raises:
        ConfigError: when the store cannot be used.
    """
    with Store.open(path, create=True) as store:
        store.set_comparison(comparison.to_dict(), environment())
        if retry_failed:
            store.retry_failed()
        notes = []
        if num_repeated := plan(store, comparison):
            notes.append(
                f"{counted(num_repeated, 'finished run')} will be repeated: the folders are needed, and not there"
            )
        possible = {
            comparison.run(group, seed, point).id
            for group in comparison.groups()
            for point in comparison.points(group.method)
            for seed in range(comparison.num_seeds)
        }
        if aside := len(set(store.set_aside()) - possible):
            notes.append(
                f"{counted(aside, 'finished run')} of other options set aside, for when they are needed again"
            )
        return notes


def compare(
    path: str | Path,
    comparison: Comparison,
    *,
    executor: Literal["local", "ray"] = "local",
    jobs: int = 1,
) -> Recorded:
    """Execute the runs that are missing in a store, and return everything it holds.

    Args:
        path: the store, after ``set_up``.
        comparison: its comparison.
        executor: this machine, or a Ray cluster; the results are the same.
        jobs: the number of processes on this machine.
    Raises:
        ConfigError: when the store or the executor cannot be used; recorded runs are safe.
    """
    with Store.open(path, create=True) as store:
        if executor == "ray":
            work_on_ray(store, comparison)
        elif jobs > 1:
            with Owner(store.locks):  # from before the processes have started
                work_in_processes(store, comparison, jobs)
        else:
            work(store, comparison)
        runs = overlapping_runs(comparison, store.known())
        if runs and all((store.folder_of(run.id) / CHILD).is_file() for run in runs):
            store.set_artifact("overlap", overlap(runs, store.folder_of))
        return store.read()


def work_in_processes(store: Store, comparison: Comparison, num_jobs: int) -> None:
    """Execute runs in ``num_jobs`` processes; several GPUs are assigned to them in turn.

    Raises:
        ConfigError: when one of them failed; the others are stopped as well.
    """
    context = multiprocessing.get_context(
        "spawn"
    )  # a forked process cannot use the GPU or the parent's threads
    faults = context.SimpleQueue()
    processes = []
    for index, variables in enumerate(_surroundings(comparison.threads, num_jobs)):
        with _environment(variables):
            process = context.Process(
                target=_job,
                args=(str(store.path), comparison.to_dict(), faults),
                name=f"childtuning-{index}",
                daemon=True,
            )
            process.start()
        processes.append(process)
    try:
        running = list(processes)
        while running:
            wait([process.sentinel for process in running])
            running = [process for process in running if process.is_alive()]
            if any(process.exitcode for process in processes if process not in running):
                break
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
            process.join()
    if any(process.exitcode for process in processes):
        told = faults.get() if not faults.empty() else "a process ended without an error message."
        raise ConfigError(f"{told} Recorded runs are safe; start again to continue.")


def _job(path: str, comparison: Mapping[str, Any], faults: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    end_with_parent()
    try:
        with Store.open(path, create=True) as store:
            work(store, Comparison.from_dict(comparison))
    except (ChildTuningError, OSError) as fault:
        faults.put(str(fault))
        raise SystemExit(2) from None


def _surroundings(threads: int, num_jobs: int) -> list[dict[str, str]]:
    """The environment variables for each process."""
    import torch

    jobs: list[dict[str, str]] = []
    for index in range(num_jobs):
        variables = {"OMP_NUM_THREADS": str(threads)}
        count = torch.cuda.device_count()
        if count > 1:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
            variables["CUDA_VISIBLE_DEVICES"] = visible[index % count]
        jobs.append(variables)
    return jobs


class _environment:  # reads as a function
    """Set variables for processes started inside; a spawned process reads them before it imports anything."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables

    def __enter__(self) -> None:
        self._before = {name: os.environ.get(name) for name in self._variables}
        os.environ.update(self._variables)

    def __exit__(self, *_: object) -> None:
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


_POLL_SECONDS = 1.0


def work_on_ray(store: Store, comparison: Comparison) -> None:
    """Execute runs as tasks of a Ray cluster: the one this process is connected to, else the default one.

    Each run requests ``threads`` processors, and a GPU if the cluster has any. Data, models and the store's folder
    of files must be accessible from every node under the same paths.

    Raises:
        ConfigError: when Ray is not installed, or there is no cluster.
    """
    ray = _connected()
    resources: Mapping[str, float] = ray.cluster_resources()
    options = {"num_cpus": comparison.threads, "num_gpus": 1 if resources.get("GPU") else 0, "max_retries": 3}
    places = int(resources.get("GPU") or resources.get("CPU", 1) // comparison.threads)
    if places < 1:
        raise ConfigError(
            f"a run needs {comparison.threads} processors, but the cluster has {resources.get('CPU', 0):.0f}. "
            "Pass fewer --threads."
        )
    remote = ray.remote(**options)(_one_run)
    keep = comparison.keep or bool(comparison.transfer_to)
    at_work: dict[Any, Record] = {}
    with Owner(store.locks) as owner:
        try:
            while True:
                plan(store, comparison)
                while len(at_work) < places and (run := store.claim(owner)) is not None:
                    folder, same = str(store.folder_of(run.id)), same_as(run, store)
                    task = remote.remote(run.to_dict(), folder, comparison.threads, keep, same)
                    at_work[task] = run
                if not at_work:
                    if not store.num_running():
                        return
                    time.sleep(_POLL_SECONDS)  # another driver is working
                    continue
                for task in ray.wait(list(at_work), timeout=_POLL_SECONDS)[0]:
                    run = at_work.pop(task)
                    done = _result(ray, task, run)
                    store.finish(done, owner)
        finally:
            for task, run in at_work.items():
                ray.cancel(task, force=True)
                store.release(run, owner)


def _connected() -> Any:
    try:
        ray: Any = import_module("ray")
    except ImportError:
        raise ConfigError("--executor ray needs Ray. Install it: pip install ray.") from None
    if not ray.is_initialized():
        try:
            ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
        except ConnectionError:
            raise ConfigError(
                "no Ray cluster was found. Start one with `ray start --head`, or set RAY_ADDRESS."
            ) from None
    return ray


def _one_run(
    run: Mapping[str, Any], folder: str, threads: int, keep: bool, same: Mapping[str, str | None]
) -> dict[str, Any]:
    """The task of a Ray worker; its process caches inputs for the next run."""
    import torch

    torch.set_num_threads(threads)
    if not hasattr(_one_run, "inputs"):
        _one_run.inputs = Inputs(keep=True)  # type: ignore[attr-defined]
    inputs: Inputs = _one_run.inputs  # type: ignore[attr-defined]
    return execute(Record.from_dict(run), Path(folder), inputs, keep=keep, **same).to_dict()


def _result(ray: Any, task: Any, run: Record) -> Record:
    """Return a finished run, or a failed run if its worker failed."""
    try:
        return Record.from_dict(ray.get(task))
    except ray.exceptions.RayError as fault:
        return replace(
            run, state="failed", error=f"{type(fault).__name__}: {' '.join(str(fault).split())}"[:1000]
        )
