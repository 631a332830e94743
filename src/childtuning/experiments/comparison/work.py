"""Do the runs of a comparison until none is left."""

from __future__ import annotations

import os
import platform
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from childtuning.experiments.comparison.design import Comparison
from childtuning.experiments.comparison.execution import execute
from childtuning.experiments.comparison.owners import Owner
from childtuning.experiments.comparison.plan import needed
from childtuning.experiments.comparison.records import Record
from childtuning.experiments.comparison.store import Store
from childtuning.experiments.shared_inputs import Inputs

_POLL_SECONDS = 0.5
_PACKAGES = ("childtuning", "torch", "transformers", "peft", "numpy", "scipy")


def environment() -> dict[str, Any]:
    """Say what results depend on beside the options."""
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


def plan(store: Store, comparison: Comparison) -> None:
    """Bring the store's plan up to what is recorded in it."""
    store.plan(list(needed(comparison, store.known(), store.folder_of)))


def work(store: Store, comparison: Comparison) -> None:
    """Do runs, one after the other, until all are done; any number of processes may do so at once.

    Args:
        store: what is done, and by whom; the comparison has been set.
        comparison: what is needed.
    Raises:
        ConfigError: the store cannot be written to; what is recorded is safe.
        OSError: the disk is full or cannot be written to.
    """
    import torch

    torch.set_num_threads(comparison.threads)
    inputs = Inputs(keep=True)
    keep = comparison.keep or bool(comparison.transfer_to)
    last: Record | None = None
    with Owner(store.locks) as owner:
        while True:
            plan(store, comparison)
            run = store.claim(owner, last)
            if run is None:
                if not store.num_running():
                    return
                # Another process is at work: its runs may ask for more, or be left to us.
                time.sleep(_POLL_SECONDS)
                continue
            try:
                last = execute(run, store.folder_of(run.id), inputs, keep=keep)
                store.finish(last, owner)
            except BaseException:
                _give_back(store, run, owner)
                raise


def _give_back(store: Store, run: Record, owner: Owner) -> None:
    try:
        store.release(run, owner)
    except Exception:  # the disk may be full: the lock's end says the same
        return


def end_with_parent() -> None:
    """Let this process end when the one that started it does, however that ends."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
