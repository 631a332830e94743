"""The AdamW step of ``kernels/adamw.py`` on whole parameters, in one pass over memory."""

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from childtuning.kernels.triton_kernels.masks import keep_entries
from childtuning.kernels.triton_kernels.records import (
    COUNT,
    FIRST,
    GRADIENT,
    PLACES,
    SECOND,
    WEIGHT,
    WIDTH,
    first_entry,
    number,
    pointer,
    record_of,
)


@triton.jit
def update(record, w, g, m, v):
    """Return the weights and moments after a step, all float32."""
    g = g * number(record, 8) + number(record, 1) * w
    m = m + (g - m) * number(record, 2)
    v = v * number(record, 3) + g * g * number(record, 4)
    denominator = tl.sqrt_rn(v) * number(record, 7) + number(record, 5)
    w = w * number(record, 0) - tl.div_rn(number(record, 6) * m, denominator)
    return w, m, v


@triton.jit
def _step(
    record,
    at,
    g,
    inside,
    W: tl.constexpr,
    M: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Update the entries at … of weight and moments; ``inside`` is ``None`` where there are as many."""
    weight = pointer(record, WEIGHT, W, ALIGNED) + at
    first = pointer(record, FIRST, M, ALIGNED) + at
    second = pointer(record, SECOND, M, ALIGNED) + at
    w, m, v = update(
        record,
        tl.load(weight, mask=inside).to(tl.float32),
        g,
        tl.load(first, mask=inside).to(tl.float32),
        tl.load(second, mask=inside).to(tl.float32),
    )
    tl.store(weight, w.to(W), mask=inside)
    tl.store(first, m.to(M), mask=inside)
    tl.store(second, v.to(M), mask=inside)


@triton.jit
def masked_kernel(
    table,
    owners,
    W: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    ALIGNED: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Update whole parameters under masks that are drawn on the way."""
    record = record_of(table, owners)
    start = first_entry(record, ENTRIES)
    count = tl.load(record + COUNT)
    at = start + tl.arange(0, ENTRIES)
    keep = keep_entries(record, start, ENTRIES)
    gradient = pointer(record, GRADIENT, G, ALIGNED) + at
    if start + ENTRIES <= count:  # without a mask loads are wide
        g = tl.where(keep, tl.load(gradient).to(tl.float32), 0.0)
        _step(record, at, g, None, W, M, ALIGNED)
    else:
        inside = at < count
        g = tl.where(keep, tl.load(gradient, mask=inside, other=0.0).to(tl.float32), 0.0)
        _step(record, at, g, inside, W, M, ALIGNED)


@triton.jit
def rows_kernel(
    table,
    owners,
    W: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    ALIGNED: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Update whole parameters of which row r has the gradient at place[r], or none where that is negative."""
    record = record_of(table, owners)
    start = first_entry(record, ENTRIES)
    count, width = tl.load(record + COUNT), tl.load(record + WIDTH)
    row = start // width
    offset = (start - row * width).to(tl.int32) + tl.arange(0, ENTRIES)  # 32 bits divide several times faster
    at = start + tl.arange(0, ENTRIES)
    inside = at < count
    down, across = offset // width.to(tl.int32), offset % width.to(tl.int32)
    place = tl.load(pointer(record, PLACES, tl.int32, False) + row + down, mask=inside, other=-1)
    gradient = pointer(record, GRADIENT, G, False) + place.to(tl.int64) * width + across
    g = tl.load(gradient, mask=inside & (place >= 0), other=0.0).to(tl.float32)
    if start + ENTRIES <= count:
        _step(record, at, g, None, W, M, ALIGNED)
    else:
        _step(record, at, g, inside, W, M, ALIGNED)
