"""The masks of ``kernels/philox.py`` on a GPU, bit for bit. Shapes: B Philox blocks of 32 entries a program."""

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from childtuning.kernels.triton_kernels.records import (
    COUNT,
    GRADIENT,
    KEY0,
    KEY1,
    START,
    THRESHOLD,
    WEIGHT,
    first_entry,
    number,
    pointer,
    record_of,
)


@triton.jit
def keep_entries(record, start, ENTRIES: tl.constexpr):
    """Draw whether each entry start … start+ENTRIES is kept: bool [ENTRIES]; start is a multiple of 32."""
    B: tl.constexpr = ENTRIES // 32
    key0 = tl.load(record + KEY0).to(tl.uint64, bitcast=True)
    key1 = tl.load(record + KEY1).to(tl.uint64, bitcast=True)
    threshold = tl.load(record + THRESHOLD).to(tl.uint64, bitcast=True)
    top, rest = (threshold >> 56).to(tl.int32), threshold & 0xFFFFFFFFFFFFFF
    blocks = start // 32 + tl.arange(0, B)
    zero = tl.zeros((B,), tl.uint64)
    # numpy's generator, which drew these bits first, runs one block ahead of its counter
    w0, w1, w2, w3 = tl.philox_impl((blocks + 1).to(tl.uint64), zero, zero, zero, key0, key1)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (B, 4, 1))
    shifts = (8 * tl.arange(0, 8)).to(tl.uint64)
    drawn = tl.reshape(((words >> shifts[None, None, :]) & 0xFF).to(tl.int32), (B, 32))
    keep = (drawn < top).to(tl.int32)
    # One entry in 256 is decided by 56 more bits. Each round takes one such entry of every block: one Philox for a
    # block, where deciding all entries at once would be one for each of its 32.
    lanes = tl.arange(0, 32)[None, :]
    waiting = tl.where((drawn == top) & (rest > 0), lanes, 32)
    first = tl.min(waiting, axis=1)
    while tl.min(first, axis=0) < 32:
        entries = (blocks * 32 + first).to(tl.uint64)
        word, _1, _2, _3 = tl.philox_impl(entries, zero + 1, zero, zero, key0, key1)
        kept = ((word >> 8) < rest).to(tl.int32)
        chosen = lanes == first[:, None]
        keep = tl.where(chosen, kept[:, None], keep)
        waiting = tl.where(chosen, 32, waiting)
        first = tl.min(waiting, axis=1)
    return tl.reshape(keep, (ENTRIES,)) != 0


@triton.jit
def keep_kernel(table, owners, ENTRIES: tl.constexpr):
    """Write the entries start … start+count of a mask."""
    record = record_of(table, owners)
    start = tl.load(record + START)
    base = start // ENTRIES * ENTRIES + first_entry(record, ENTRIES)
    at = base - start + tl.arange(0, ENTRIES)
    keep = keep_entries(record, base, ENTRIES)
    out = pointer(record, WEIGHT, tl.int8, False)
    tl.store(out + at, keep.to(tl.int8), mask=(at >= 0) & (at < tl.load(record + COUNT)))


@triton.jit
def scale_kernel(table, owners, G: tl.constexpr, ENTRIES: tl.constexpr):
    """g = kept ? g · scale : 0, in place."""
    record = record_of(table, owners)
    start = first_entry(record, ENTRIES)
    at = start + tl.arange(0, ENTRIES)
    inside = at < tl.load(record + COUNT)
    gradient = pointer(record, GRADIENT, G, False) + at
    scaled = tl.load(gradient, mask=inside, other=0.0).to(tl.float32) * number(record, 8)
    kept = tl.where(keep_entries(record, start, ENTRIES), scaled, 0.0)
    tl.store(gradient, kept.to(G), mask=inside)
