"""Reading the table that ``kernels/gpu.py`` writes: one record of 8-byte columns for each parameter."""

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from childtuning.kernels.gpu import RECORD

_names = list(RECORD.names or ())


def _column(name: str) -> tl.constexpr:
    return tl.constexpr(_names.index(name))


COLUMNS = tl.constexpr(RECORD.itemsize // 8)
WEIGHT, GRADIENT, FIRST, SECOND = (_column(name) for name in ("weight", "gradient", "first", "second"))
VALUES, PLACES, PROGRAM, COUNT = (_column(name) for name in ("values", "places", "program", "count"))
WIDTH, START, COMPACT_GRADIENT = (_column(name) for name in ("width", "start", "compact_gradient"))
KEY0, KEY1, THRESHOLD = (_column(name) for name in ("key0", "key1", "threshold"))
NUMBERS_AT = tl.constexpr(2 * _column("numbers").value)  # in float32 numbers


@triton.jit
def record_of(table, owners):
    """Find this program's record."""
    return table + tl.load(owners + tl.program_id(0)).to(tl.int64) * COLUMNS


@triton.jit
def first_entry(record, ENTRIES: tl.constexpr):
    """Return the first of this program's entries within its record, int64, a multiple of ENTRIES."""
    return (tl.program_id(0) - tl.load(record + PROGRAM)) * ENTRIES


@triton.jit
def pointer(record, column: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """Read an address; ALIGNED says that it is a multiple of 16, so that loads may be wide."""
    address = tl.load(record + column).to(tl.pointer_type(dtype))  # pyright: ignore[reportArgumentType]
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def number(record, i: tl.constexpr):
    """Read the i-th of the hyperparameters, float32, in the order of ``NUMBERS``."""
    return tl.load(record.to(tl.pointer_type(tl.float32)) + NUMBERS_AT + i)
