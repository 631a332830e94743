"""Do the runs of a comparison on a Ray cluster; the driver alone writes to the store."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from childtuning.errors import ConfigError
from childtuning.experiments.comparison.design import Comparison
from childtuning.experiments.comparison.execution import execute
from childtuning.experiments.comparison.owners import Owner
from childtuning.experiments.comparison.records import Record
from childtuning.experiments.comparison.store import Store
from childtuning.experiments.comparison.work import plan
from childtuning.experiments.shared_inputs import Inputs

_POLL_SECONDS = 1.0


def work_on_ray(store: Store, comparison: Comparison) -> None:
    """Do runs as tasks of a Ray cluster: of the one this process is connected to, else of the one around it.

    Each run asks for ``threads`` processors, and for a GPU where the cluster has any. Data, models and the folder
    beside the store have to be reachable from every node by the same paths.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster.
    """
    ray = _connected()
    resources: Mapping[str, float] = ray.cluster_resources()
    options = {"num_cpus": comparison.threads, "num_gpus": 1 if resources.get("GPU") else 0, "max_retries": 3}
    places = int(resources.get("GPU") or resources.get("CPU", 1) // comparison.threads)
    if places < 1:
        raise ConfigError(
            f"a run asks for {comparison.threads} processors, the cluster has {resources.get('CPU', 0):.0f}. "
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
                    task = remote.remote(
                        run.to_dict(), str(store.folder_of(run.id)), comparison.threads, keep
                    )
                    at_work[task] = run
                if not at_work:
                    if not store.num_running():
                        return
                    time.sleep(_POLL_SECONDS)  # another driver is at work
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
        raise ConfigError("--executor ray needs Ray. Install it: pip install 'childtuning[ray]'.") from None
    if not ray.is_initialized():
        try:
            ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
        except ConnectionError:
            raise ConfigError(
                "there is no Ray cluster here. Start one with `ray start --head`, or set RAY_ADDRESS."
            ) from None
    return ray


def _one_run(run: Mapping[str, Any], folder: str, threads: int, keep: bool) -> dict[str, Any]:
    """What a worker does; its process keeps inputs for the next run."""
    import torch

    torch.set_num_threads(threads)
    if not hasattr(_one_run, "inputs"):
        _one_run.inputs = Inputs(keep=True)  # type: ignore[attr-defined]
    return execute(Record.from_dict(run), Path(folder), _one_run.inputs, keep=keep).to_dict()  # type: ignore[attr-defined]


def _result(ray: Any, task: Any, run: Record) -> Record:
    """Return a finished run; one whose worker failed is a failed run."""
    try:
        return Record.from_dict(ray.get(task))
    except ray.exceptions.RayError as fault:
        return replace(
            run, state="failed", error=f"{type(fault).__name__}: {' '.join(str(fault).split())}"[:1000]
        )
