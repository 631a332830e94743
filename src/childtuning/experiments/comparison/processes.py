"""Do the runs of a comparison in several processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Mapping
from multiprocessing.connection import wait
from typing import Any

from childtuning.errors import ChildTuningError, ConfigError
from childtuning.experiments.comparison.design import Comparison
from childtuning.experiments.comparison.store import Store
from childtuning.experiments.comparison.work import end_with_parent, work


def work_in_processes(store: Store, comparison: Comparison, num_jobs: int) -> None:
    """Do runs in ``num_jobs`` processes; with several GPUs each has one of them, by turns.

    Raises:
        ConfigError: one of them could not go on; the others have stopped as well.
    """
    context = multiprocessing.get_context(
        "spawn"
    )  # a forked process cannot use a GPU, nor threads that it lost
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
        told = faults.get() if not faults.empty() else "a process ended without a word."
        raise ConfigError(f"{told} What is recorded is safe; start again to go on.")


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
    """The environment variables of each job."""
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
    """Set variables for what is started inside; a spawned process reads them before it imports anything."""

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
