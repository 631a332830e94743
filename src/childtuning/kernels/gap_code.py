"""Sorted indices as Golomb-Rice coded gaps [Rice 1979]: a few bits an index instead of 32 or 64.

For sorted indices i_1 < i_2 < … the gaps g_j = i_j − i_{j−1} − 1 are split at bit k: the high parts in unary (all of
them first, as one bitmap whose ones end each gap), then the low k bits of each, packed. The two streams are kept
apart so that both directions are a handful of vector operations. k is chosen by exact cost; with n of N entries
the code is never longer than n·(k + 1) + N / 2^k bits, whatever the distribution, and for entries chosen
independently it is within a few per cent of the entropy H(p)/p bits each.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MAX_LOW_BITS = 40


def encode_gaps(indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], int]:
    """Code strictly increasing, non-negative indices.

    Args:
        indices: int64 [n], strictly increasing.
    Returns:
        (stream, k): the bytes, uint8, and the number of low bits. ``decode_gaps`` needs both, and n.
    """
    n = len(indices)
    if n == 0:
        return np.zeros(0, np.uint8), 0
    gaps = np.diff(indices, prepend=-1) - 1
    k = min(range(_MAX_LOW_BITS), key=lambda bits: n * (bits + 1) + int((gaps >> bits).sum()))
    ends = np.cumsum((gaps >> k) + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1, np.uint8)
    unary[ends] = 1
    low = ((gaps[:, None] >> np.arange(k)) & 1).astype(np.uint8) if k else np.zeros((n, 0), np.uint8)
    return np.concatenate([np.packbits(unary), np.packbits(low)]), k


def decode_gaps(stream: NDArray[np.uint8], count: int, k: int) -> NDArray[np.int64]:
    """Return the int64 [count] indices that ``encode_gaps`` coded.

    Raises:
        ValueError: the stream does not hold count indices.
    """
    if count == 0:
        if len(stream):
            raise ValueError("an empty index list has a stream of no bytes")
        return np.zeros(0, np.int64)
    num_low_bytes = -(-count * k // 8)
    unary, low = stream[: len(stream) - num_low_bytes], stream[len(stream) - num_low_bytes :]
    ends = np.flatnonzero(np.unpackbits(unary))
    if len(stream) < num_low_bytes or len(ends) != count:
        raise ValueError(f"the stream does not hold {count} indices")
    gaps = (np.diff(ends, prepend=-1) - 1).astype(np.int64) << k
    if k:
        bits = np.unpackbits(low, count=count * k).reshape(count, k)
        for bit in range(k):
            gaps |= bits[:, bit].astype(np.int64) << bit
    return np.cumsum(gaps + 1) - 1
