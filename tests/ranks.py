"""Two processes that speak over gloo, started once for all tests of a session that need them.

They meet in a file, for a port that was free may be taken by then.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist

WORLD = 2
PATIENCE = timedelta(seconds=90)


def on_ranks(work: Callable[[int, Path], None], folder: Path) -> None:
    """Run `work(rank, folder)` in `WORLD` processes of one group; `work` is a module's function."""
    jobs = [_processes().submit(_rank, rank, work, folder) for rank in range(WORLD)]
    for job in jobs:
        job.result()


@cache
def _processes() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(WORLD, mp_context=get_context("spawn"))


def _rank(rank: int, work: Callable[[int, Path], None], folder: Path) -> None:
    """Neither process ends before both have met, so that each takes one of the jobs."""
    torch.set_num_threads(1)
    before = dict(os.environ)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD, timeout=PATIENCE)
    try:
        work(rank, folder)
        dist.barrier()
    finally:
        dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)
        if "accelerate" in sys.modules:
            from accelerate.state import AcceleratorState

            AcceleratorState._reset_state(reset_partial_state=True)
