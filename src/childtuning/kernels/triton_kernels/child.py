"""A fixed child's entries: gathered, updated and scattered in one pass."""

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from childtuning.kernels.triton_kernels.adamw import update
from childtuning.kernels.triton_kernels.records import (
    COMPACT_GRADIENT,
    COUNT,
    FIRST,
    GRADIENT,
    PLACES,
    SECOND,
    START,
    VALUES,
    WEIGHT,
    WIDTH,
    first_entry,
    pointer,
    record_of,
)


@triton.jit
def _places(record, ENTRIES: tl.constexpr):
    """Return this program's compact entries, where they lie in the parameter, and which of them there are."""
    start = first_entry(record, ENTRIES)
    width = tl.load(record + WIDTH)
    unit = start // width
    offset = (start - unit * width).to(tl.int32) + tl.arange(
        0, ENTRIES
    )  # 32 bits divide several times faster
    entry = start + tl.arange(0, ENTRIES)
    inside = entry < tl.load(record + COUNT)
    down, across = offset // width.to(tl.int32), offset % width.to(tl.int32)
    index = tl.load(pointer(record, PLACES, tl.int32, False) + unit + down, mask=inside, other=0)
    return entry, index.to(tl.int64) * width + across, inside


@triton.jit
def child_kernel(
    table,
    owners,
    W: tl.constexpr,
    G: tl.constexpr,
    MASTER: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Update a child's entries; parameters whose gradient has no address are left alone."""
    record = record_of(table, owners)
    if tl.load(record + GRADIENT) != 0:
        entry, at, inside = _places(record, ENTRIES)
        flat = tl.load(record + START) + entry
        first = pointer(record, FIRST, tl.float32, False) + flat
        second = pointer(record, SECOND, tl.float32, False) + flat
        weight = pointer(record, WEIGHT, W, False) + at
        compact = tl.load(record + COMPACT_GRADIENT) != 0
        gradient = pointer(record, GRADIENT, G, False) + tl.where(compact, entry, at)
        if MASTER:
            values = pointer(record, VALUES, tl.float32, False) + flat
            w = tl.load(values, mask=inside)
        else:
            w = tl.load(weight, mask=inside).to(tl.float32)
        w, m, v = update(
            record,
            w,
            tl.load(gradient, mask=inside).to(tl.float32),
            tl.load(first, mask=inside),
            tl.load(second, mask=inside),
        )
        tl.store(weight, w.to(W), mask=inside)
        if MASTER:
            tl.store(values, w, mask=inside)
        tl.store(first, m, mask=inside)
        tl.store(second, v, mask=inside)


@triton.jit
def gather_kernel(
    table,
    owners,
    G: tl.constexpr,
    OUT: tl.constexpr,
    ADD: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Write a child's entries of dense gradients to the flat tensor, or add them to it."""
    record = record_of(table, owners)
    if tl.load(record + GRADIENT) != 0:
        entry, at, inside = _places(record, ENTRIES)
        g = tl.load(pointer(record, GRADIENT, G, False) + at, mask=inside).to(tl.float32)
        out = pointer(record, FIRST, OUT, False) + tl.load(record + START) + entry
        if ADD:
            g += tl.load(out, mask=inside).to(tl.float32)
        tl.store(out, g.to(OUT), mask=inside)
