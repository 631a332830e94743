"""The kernels in Triton: masks bit for bit as on the CPU, and AdamW of whole parameters and of a child's entries.

``fast/gpu.py`` imports this with the first launch, and writes the table that the kernels read: one record of 8-byte
columns for each parameter. Shapes: B Philox blocks of 32 entries a program.
"""

from __future__ import annotations

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from childtuning.fast.library import RECORD

_names = list(RECORD.names or ())


def _column(name: str) -> tl.constexpr:
    return tl.constexpr(_names.index(name))


COLUMNS = tl.constexpr(RECORD.itemsize // 8)
WEIGHT, GRADIENT, FIRST, SECOND = (_column(name) for name in ("weight", "gradient", "first", "second"))
MASTER_AT, PLACES, PROGRAM, COUNT = (_column(name) for name in ("master", "places", "program", "count"))
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
    SHARD: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Update whole parameters, or shards of them, under masks that are drawn on the way."""
    record = record_of(table, owners)
    start = first_entry(record, ENTRIES)
    mask_start = tl.load(record + START) if SHARD else 0
    if SHARD:  # programs begin at multiples of ENTRIES in the mask
        start -= mask_start % ENTRIES
    count = tl.load(record + COUNT)
    at = start + tl.arange(0, ENTRIES)
    keep = keep_entries(record, mask_start + start, ENTRIES)
    gradient = pointer(record, GRADIENT, G, ALIGNED) + at
    if (start >= 0) & (start + ENTRIES <= count):  # without a mask loads are wide
        g = tl.where(keep, tl.load(gradient).to(tl.float32), 0.0)
        _step(record, at, g, None, W, M, ALIGNED)
    else:
        inside = (at >= 0) & (at < count)
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
    """Update whole parameters; row r has the gradient at place[r], or none if that is negative."""
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


@triton.jit
def child_kernel(
    table,
    owners,
    W: tl.constexpr,
    G: tl.constexpr,
    MASTER: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Update a child's entries."""
    record = record_of(table, owners)
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
    at = index.to(tl.int64) * width + across
    first = pointer(record, FIRST, tl.float32, False) + entry
    second = pointer(record, SECOND, tl.float32, False) + entry
    weight = pointer(record, WEIGHT, W, False) + at
    compact = tl.load(record + COMPACT_GRADIENT) != 0
    gradient = pointer(record, GRADIENT, G, False) + tl.where(compact, entry, at)
    if MASTER:
        master = pointer(record, MASTER_AT, tl.float32, False) + entry
        w = tl.load(master, mask=inside)
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
        tl.store(master, w, mask=inside)
    tl.store(first, m, mask=inside)
    tl.store(second, v, mask=inside)
