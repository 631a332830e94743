"""The compiled CPU kernels (``native/*.c``), called from as many threads as torch uses.

They are compiled when the package is installed. Where there was no compiler ``LIBRARY`` is ``None`` and torch's own
operations serve, which are slower.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray


def _load() -> ctypes.CDLL | None:
    path = Path(__file__).with_name("native") / "kernels.so"
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None


LIBRARY = _load()


class Draw(ctypes.Structure):
    """``ct_draw``: the key of a stream of bits, and the threshold below which an entry is kept."""

    _fields_ = [
        ("key", ctypes.c_uint64 * 2),
        ("top", ctypes.c_uint32),
        ("rest", ctypes.c_uint64),
    ]


def _record(pointers: str, numbers: str, last_pointers: str = "") -> np.dtype:
    """Lay out a C struct of pointers and int64 numbers."""
    fields = [(name, np.uintp) for name in pointers.split()]
    fields += [(name, np.int64) for name in numbers.split()]
    return np.dtype(fields + [(name, np.uintp) for name in last_pointers.split()])


NUMBERS = np.dtype(
    [
        (name, np.float32)
        for name in [
            "lr_decay",
            "l2",
            "rate1",
            "beta2",
            "rate2",
            "eps",
            "step_size",
            "inv_sqrt_correction",
            "scale",
        ]
    ]
)  # ct_adamw
STRETCH = _record("weight gradient first second index", "count width compact_gradient")  # ct_stretch
MASKED = _record("weight gradient first second", "start count", "draw numbers")  # ct_masked
ROWS = _record("weight gradient first second", "start count width", "place numbers")  # ct_rows


def _declare(library: ctypes.CDLL) -> None:
    pointer, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    draw = ctypes.POINTER(Draw)
    for name, types in {
        "ct_adamw_stretches": [pointer, number, pointer, pointer],
        "ct_adamw_masked": [pointer, number, pointer],
        "ct_adamw_rows": [pointer, number, pointer],
        "ct_gather_stretches": [pointer, number, pointer, number],
        "ct_keep_mask": [pointer, number, number, draw],
        "ct_mask_scale": [pointer, number, number, real, draw],
        "ct_sample": [pointer, number, number, real, pointer],
        "ct_bracket": [pointer, number, real, real, real, pointer, pointer, number],
        "ct_collect": [pointer, number, real, real, number, number, number, pointer],
    }.items():
        function = library[name]
        function.argtypes = types
        function.restype = None
        setattr(library, name, function)


if LIBRARY is not None:
    _declare(LIBRARY)


@cache
def _threads(count: int, process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="childtuning")


def parallel(work: Callable[[int], None], count: int) -> None:
    """Call ``work(0) … work(count - 1)`` on torch's number of threads; the calls release the GIL by themselves."""
    num_threads = min(torch.get_num_threads(), count)
    if num_threads <= 1:
        for i in range(count):
            work(i)
        return

    def share(first: int) -> None:
        for i in range(first, count, num_threads):
            work(i)

    threads = _threads(num_threads - 1, os.getpid())  # by process: threads do not survive a fork
    others = [threads.submit(share, first) for first in range(1, num_threads)]
    try:
        share(0)
    finally:
        wait(others)  # whatever happened, they work on memory that the caller may free
    for other in others:
        other.result()


def run_tasks(name: str, tasks: NDArray, *others: int) -> None:
    """Let every thread take tasks from a compiled kernel's table until none is left."""
    assert LIBRARY is not None
    function, queue = getattr(LIBRARY, name), np.zeros(1, np.int64)
    arguments = (queue.ctypes.data, len(tasks), tasks.ctypes.data, *others)
    parallel(lambda _: function(*arguments), min(torch.get_num_threads(), len(tasks)))
