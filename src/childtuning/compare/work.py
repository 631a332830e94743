"""Execute the runs of a comparison one after another until none is left."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from childtuning.compare.design import Comparison
from childtuning.compare.files import Owner
from childtuning.compare.plan import needed, without_folders
from childtuning.compare.records import Record, artifact_of
from childtuning.compare.store import Store
from childtuning.delta import Delta
from childtuning.errors import DataError, as_os_error
from childtuning.runs.config import RunConfig, json_ready
from childtuning.runs.folder import CONFIG, METRICS, TENSORBOARD, RunResult
from childtuning.runs.inputs import Inputs
from childtuning.runs.run import train_run
from childtuning.tasks import Task

_POLL_SECONDS = 0.5
_MOST_CLASSES = 20  # a record holds each class of a task with no more
_PACKAGES = ("childtuning", "torch", "transformers", "peft", "numpy", "scipy")


def environment() -> dict[str, Any]:
    """Return the versions and hardware that results depend on besides the options."""
    import torch

    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cores": os.cpu_count(),
        **{name: found for name in _PACKAGES if (found := _version(name)) is not None},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def plan(store: Store, comparison: Comparison) -> int:
    """Update the store's plan from its recorded runs; return how many finished runs are to be repeated."""
    lost = without_folders(comparison, store.known(), store.folder_of, store.artifact("overlap"))
    asked = comparison.to_dict()
    num_repeated = store.repeat(lost, lambda run_id: not (store.folder_of(run_id) / METRICS).is_file(), asked)
    store.plan(list(needed(comparison, store.known(), store.folder_of)), asked)
    return num_repeated


def work(store: Store, comparison: Comparison) -> None:
    """Execute runs one after another until all are done; several processes may do so at once.

    Args:
        store: the store, with its comparison set.
        comparison: the comparison.
    Raises:
        ConfigError: when the store cannot be written to; recorded runs are safe.
        OSError: when the disk is full or not writable.
    """
    with _threads(comparison.threads), Owner(store.locks) as owner:
        _work(store, comparison, owner)


def _work(store: Store, comparison: Comparison, owner: Owner) -> None:
    inputs = Inputs(keep=True)
    keep = comparison.keep or bool(comparison.transfer_to)
    last: Record | None = None
    while True:
        plan(store, comparison)
        run = store.claim(owner, last)
        if run is None:
            if not store.num_running():
                return
            # Another process is working: its runs may require more runs, or be left for this process.
            time.sleep(_POLL_SECONDS)
            continue
        try:
            same = same_as(run, store)
            last = execute(run, store.folder_of(run.id), inputs, keep=keep, **same)
            _keep_examples(store, last, inputs)
            store.finish(last, owner)
        except BaseException:
            _give_back(store, run, owner)
            raise


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Let torch compute with so many threads inside, and with as many as before afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _give_back(store: Store, run: Record, owner: Owner) -> None:
    try:
        store.release(run, owner)
    except Exception:  # the disk may be full; releasing the lock has the same effect
        return


def end_with_parent() -> None:
    """End this process when its parent process ends for any reason."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_OUR_SURROUNDINGS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # other runs would fail too


def same_as(run: Record, store: Store) -> dict[str, str | None]:
    """Return what a run must have in common with others of its task, as far as it is recorded, for ``execute``.

    Returns:
        ``base_hash``: of the base model; ``examples``: of the evaluation examples.
    """

    def model(run: Record) -> Any:
        return run.group.task, run.config.get("model")

    def data(run: Record) -> Any:
        return run.group.task, run.group.train_size

    def first(runs: Iterable[Record], place: Callable[[Record], Any], name: str) -> str | None:
        found = (other.result.get(name) for other in runs if other.result and place(other) == place(run))
        return next((value for value in found if value), None)

    return {
        "base_hash": first(store.known().values(), model, "base_hash"),
        "examples": first(store.records_in_brief(), data, "examples"),
    }


def check_size(task: Task, run: Record) -> None:
    """Raise a DataError if there are fewer training examples than asked for; a new head takes what its task has."""
    there, asked = len(task.train), run.group.train_size
    if asked is not None and there < asked and run.group.start is None:
        raise DataError(
            f"there are {there:,} training examples, got a size of {asked:,}. Pass a smaller one."
        )


def execute(
    run: Record,
    folder: Path,
    inputs: Inputs,
    *,
    keep: bool,
    base_hash: str | None = None,
    examples: str | None = None,
) -> Record:
    """Train and evaluate, and return the run with its result; an error becomes part of the record.

    A run that was killed continues from its last checkpoint.

    Args:
        run: the run to execute.
        folder: its own folder.
        inputs: inputs shared with previous runs.
        keep: keep the folder; otherwise it is removed once its results are recorded.
        base_hash: the run fails, before training, if its base model has another; ``None``: anything.
        examples: likewise of its evaluation examples.
    Raises:
        OSError: when the disk is full or not writable.
    """
    import torch

    start = time.perf_counter()
    try:
        config = RunConfig.from_options(run.config)
        check_size(inputs.task(config)[0], run)
        if examples is not None and _examples(inputs, config)[0] != examples:
            raise DataError(
                "the evaluation examples are not those of the runs recorded before: an earlier version drew others "
                "from these files. Pass another --store."
            )
        result = train_run(config, folder, resume=_is_begun(folder), inputs=inputs, base_hash=base_hash)
        done = replace(
            run,
            state="done",
            result=json_ready(_kept(result) | {"output": str(folder) if keep else None})
            | ({} if result.answers is None else {"examples": _examples(inputs, config)[0]}),
            curve=_curve(folder / "log.jsonl"),
            parts=_parts(folder),
        )
    except Exception as fault:
        of_disk = as_os_error(fault)
        if of_disk is not None and of_disk.errno in _OUR_SURROUNDINGS:
            raise of_disk from fault
        done = replace(run, state="failed", error=_one_line(fault))
        if isinstance(fault, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
    if not (keep and done.state == "done"):
        _keep_board(folder, run.id)
        shutil.rmtree(folder, ignore_errors=True)
    return replace(done, seconds=time.perf_counter() - start)


def _kept(result: RunResult) -> dict[str, Any]:
    """Return a result without what would make the store large: texts of examples, and tables of many classes."""
    left_out: dict[str, Any] = {"understood": {}, "errors": []}
    if len(result.per_class or ()) > _MOST_CLASSES:
        left_out |= {"per_class": None, "confusion": None}
    return result.to_dict() | left_out


def _keep_examples(store: Store, run: Record, inputs: Inputs) -> None:
    """Record the evaluation examples of a run in short, beside which a report shows the answers."""
    digest = (run.result or {}).get("examples")
    if digest is not None and store.artifact(artifact_of(digest)) is None:
        _, examples = _examples(inputs, RunConfig.from_options(run.config))
        store.set_artifact(artifact_of(digest), examples)


def _examples(inputs: Inputs, config: RunConfig) -> tuple[str, dict[str, list[str]]]:
    """Return a hash of a run's evaluation examples, and the beginning and label of each."""
    dev = inputs.task(config)[0].dev
    found = {"labels": [*map(str, dev.strata() or ())], "shown": [dev.shown(row) for row in range(len(dev))]}
    # Of images their content counts, wherever they lie.
    digests = [one.hex() for one in dev.contents() or () if isinstance(one, bytes)]
    told = {**found, "shown": digests or found["shown"]}
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16], found


def _keep_board(folder: Path, name: str) -> None:
    """Move TensorBoard's files out of the run's folder, which will be removed."""
    if (folder / TENSORBOARD).is_dir():
        boards = folder.parent.parent / TENSORBOARD
        boards.mkdir(exist_ok=True)
        shutil.rmtree(boards / name, ignore_errors=True)
        (folder / TENSORBOARD).rename(boards / name)


def _is_begun(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def _one_line(fault: Exception) -> str:
    return f"{type(fault).__name__}: {' '.join(str(fault).split())}"[:1000]


def _curve(path: Path) -> list[dict[str, Any]]:
    """Return the training log, without entries that are the same for every run."""
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        {name: line[name] for name in ("step", "loss", "grad_norm", "learning_rate") if name in line}
        for line in map(json_ready, lines)
        if "loss" in line
    ]


def _parts(folder: Path) -> dict[str, tuple[int, int]]:
    """Return parameter name -> (trained entries, all entries)."""
    parts = Delta.load(folder).parts
    return {
        name: (part.num_trained, math.prod(part.shape)) for name, part in parts.items() if part.num_trained
    }
