"""The compiled CPU kernels (``native/*.c``), called from as many threads as torch uses, and the masks they draw.

They are compiled when the package is installed. Where there was no compiler ``LIBRARY`` is ``None``, and the
definitions in torch and numpy serve.

Kernels run on torch's own threads where those are OpenMP's. For a while after each operation of torch's these threads
wait without sleeping, and would keep threads of ours from the processors.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from childtuning import fast
from childtuning.fast.runs import cut


def _load() -> ctypes.CDLL | None:
    path = Path(__file__).with_name("native") / "kernels.so"
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None


LIBRARY = _load()
BLOCK_ENTRIES = 32  # one Philox4x64 block: four words of eight bytes
_ENTRIES_A_TASK = 1 << 18
_PROCESS = os.getpid()  # threads do not survive a fork


class MaskDraw(NamedTuple):
    """A Bernoulli mask defined by a key and a threshold; it is not stored.

    Args:
        key: the two words that name its stream of bits.
        threshold: p·2^64, below 2^64.
        start: which of the mask's entries is the first of the tensor that it lies on: not 0 for a shard.
    """

    key: tuple[int, int]
    threshold: int
    start: int = 0

    def native(self) -> Draw:
        """Return it as the compiled kernels take it."""
        return Draw((ctypes.c_uint64 * 2)(*self.key), self.threshold >> 56, self.threshold & ((1 << 56) - 1))


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
JOB = _record("kernel tasks", "num size next")  # ct_job
STRETCH = _record(
    "weight gradient first second index", "count width repeats period compact_gradient", "numbers"
)  # ct_stretch
MASKED = _record("weight gradient first second", "start count mask_start", "draw numbers")  # ct_masked
ROWS = _record("weight gradient first second", "start count width", "place numbers")  # ct_rows
ENTRIES = _record("there written before index", "count width repeats period stride")  # ct_entries
PRODUCTS = _record(
    "left right score room",
    "examples terms rows columns left_example left_term right_example right_term",
)  # ct_products
KEPT = _record("out", "start count", "draw")  # ct_kept
DROPPED = np.dtype(
    [
        *_record("out in", "start count", "draw").descr,
        ("scale", np.float32),
        ("padding", np.float32),
    ]
)  # ct_dropped
POINTERS = ["weight", "gradient", "first", "second", "master", "places"]
# Every column is 8 bytes wide, so that kernels find them by number; ``program`` is the record's first one.
RECORD = np.dtype(
    [(name, np.int64) for name in [*POINTERS, "program", "count", "width", "compact_gradient", "start"]]
    + [(name, np.uint64) for name in ["key0", "key1", "threshold"]]
    + [("numbers", NUMBERS), ("padding", np.float32)]
)  # of a GPU kernel


class AdamWStep(NamedTuple):
    """One step's hyperparameters, named as in ``fast/adamw.py``.

    Args:
        lr, beta1, beta2, eps, weight_decay: as there.
        step: t, counted from 1.
        decoupled: AdamW; else the decay is added to the gradient, as in Adam.
        scale: s; negative to maximise.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    decoupled: bool = True
    scale: float = 1.0

    def numbers(self) -> NDArray:
        """Compute in float64 what the kernels multiply with; then float32."""
        return np.array(
            (
                1 - self.lr * self.weight_decay if self.decoupled else 1.0,
                0.0 if self.decoupled else self.weight_decay,
                1 - self.beta1,
                self.beta2,
                1 - self.beta2,
                self.eps,
                self.lr / (1 - self.beta1**self.step),
                (1 - self.beta2**self.step) ** -0.5,
                self.scale,
            ),
            NUMBERS,
        )


class Member(NamedTuple):
    """One parameter in a call that updates many.

    Args:
        weight: the parameter.
        gradient: of the parameter's shape, or compact: of the entries or rows that are trained.
        first, second: the moments, of the entries that are trained.
        step: hyperparameters; the scale applies to what is kept.
        master: for a child's weights of fewer than 32 bits on a GPU, their float32 values, which are updated as well.
    """

    weight: Tensor
    gradient: Tensor
    first: Tensor
    second: Tensor
    step: AdamWStep
    master: Tensor | None = None


def _declare(library: ctypes.CDLL) -> None:
    pointer, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    for name, types in {
        "ct_work": [pointer],
        "ct_adds_squares": [],
        "ct_sample": [pointer, number, number, real, pointer],
        "ct_bracket": [pointer, number, real, real, real, pointer, pointer, number],
        "ct_collect": [pointer, number, real, real, number, number, number, pointer],
    }.items():
        try:
            function = library[name]
        except AttributeError as fault:
            raise ImportError(
                f"the compiled kernels are of another version ({fault}). Run `python hatch_build.py`, or install again."
            ) from None
        function.argtypes = types
        function.restype = None
        setattr(library, name, function)
    library.ct_adds_squares.restype = ctypes.c_int


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

    threads = _threads(num_threads - 1, os.getpid())
    others = [threads.submit(share, first) for first in range(1, num_threads)]
    try:
        share(0)
    finally:
        wait(others)  # whatever happened, they work on memory that the caller may free
    for other in others:
        other.result()


@cache
def _torchs_threads(process: int) -> Callable[..., None] | None:
    """Return what runs a function on torch's threads, GOMP_parallel; ``None`` where torch has others."""
    if process != _PROCESS:
        return None
    path = str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so")
    for place in (None, path):  # first what was loaded for all, as torch itself looks
        try:
            run = ctypes.CDLL(place).GOMP_parallel
        except (OSError, AttributeError):
            continue
        run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        run.restype = None
        return run
    return None


def run_tasks(name: str, tasks: NDArray) -> None:
    """Run a compiled kernel: each thread takes tasks from the table until none is left."""
    assert LIBRARY is not None
    work, kernel = LIBRARY.ct_work, ctypes.cast(getattr(LIBRARY, name), ctypes.c_void_p).value
    job = np.array((kernel, tasks.ctypes.data, len(tasks), tasks.itemsize, 0), JOB)
    run, num_threads = _torchs_threads(os.getpid()), torch.get_num_threads()
    if min(num_threads, len(tasks)) > 1 and run is not None:  # fewer threads would end torch's others
        run(ctypes.cast(work, ctypes.c_void_p), job.ctypes.data, num_threads, 0)
    else:
        parallel(lambda _: work(job.ctypes.data), min(num_threads, len(tasks)))


def fits(*tensors: Tensor) -> bool:
    """Tell whether the compiled kernels are there and these are contiguous float32 tensors on the CPU."""
    if LIBRARY is None:
        return False
    for t in tensors:
        if not (t.dtype is torch.float32 and t.is_cpu and t.layout is torch.strided and t.is_contiguous()):
            return False
    return True


def keep_mask(draw: MaskDraw, numel: int, start: int) -> Tensor | None:
    """Draw the entries start … start+numel of a mask: bool [numel] on the CPU; ``None`` without the kernels."""
    return None if LIBRARY is None or not fast.enabled() else _keep_mask(draw, numel, start)


def _keep_mask(draw: MaskDraw, numel: int, start: int) -> Tensor:
    skip, bits = start % BLOCK_ENTRIES, draw.native()
    keep = torch.empty(skip + numel, dtype=torch.bool, device="cpu")
    to, address = keep.data_ptr(), ctypes.addressof(bits)
    tasks = [(to + at, start - skip + at, size, address) for at, size in cut(len(keep), _ENTRIES_A_TASK)]
    run_tasks("ct_keep_mask", np.array(tasks, KEPT))
    return keep[skip:]


def dropout_(out: Tensor, draw: MaskDraw, x: Tensor, scale: float) -> None:
    """Write ``x ∘ m · scale`` for the mask m of a draw; ``out`` may be x, and the kernels must be there."""
    if not fits(x, out):
        torch.mul(x, _keep_mask(draw, x.numel(), 0).view(x.shape), out=out).mul_(scale)
        return
    bits = draw.native()
    to, source, address = out.data_ptr(), x.data_ptr(), ctypes.addressof(bits)
    tasks = [
        (to + 4 * at, source + 4 * at, at, size, address, scale, 0)
        for at, size in cut(x.numel(), _ENTRIES_A_TASK)
    ]
    run_tasks("ct_dropout", np.array(tasks, DROPPED))
