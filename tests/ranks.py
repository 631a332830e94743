"""Two processes that speak over gloo: they meet in a file, for a port that was free may be taken by then."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2
PATIENCE = timedelta(seconds=90)


def on_ranks(work: Callable[[int, Path], None], folder: Path) -> None:
    """Run `work(rank, folder)` in `WORLD` processes of one group; `work` is a module's function."""
    mp.spawn(_rank, args=(work, str(folder)), nprocs=WORLD)  # type: ignore[attr-defined]


def _rank(rank: int, work: Callable[[int, Path], None], folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD, timeout=PATIENCE)
    work(rank, Path(folder))
    dist.barrier()
    dist.destroy_process_group()
