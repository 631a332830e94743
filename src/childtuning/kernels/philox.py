"""Counter-based random bits: a mask is a function of its coordinates, never of a generator's state.

The bits are Philox4x64-10 [Salmon et al. 2011]. A key is derived from what names the draw (seed, step, parameter
name), and entry i of the tensor owns byte i of the stream under that key. Anyone who knows the coordinates can
draw entry i alone: another rank, a shard, or the same run after a crash.

Bernoulli(p) is exact to 64 bits although one byte is drawn for most entries: entry i is kept when u_i < p·2^64,
where the top byte of u_i is its byte of the stream. Only where that byte equals the top byte of p·2^64 (one entry
in 256) do the lower 56 bits decide, and they are drawn at counter (i, 1).
"""

from __future__ import annotations

import ctypes
import hashlib
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray

from childtuning.kernels.native_library import LIBRARY, Draw, parallel

BLOCK_ENTRIES = 32  # one Philox4x64 block: four words of eight bytes
_ENTRIES_A_TASK = 1 << 18
_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157))
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_WORD = 1 << 64
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def _key(*coordinates: object) -> tuple[int, int]:
    """Hash what names a draw to the 128-bit key of its stream."""
    text = "\x1f".join(str(c) for c in coordinates)
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def _stream_bytes(key: tuple[int, int], start: int, count: int) -> NDArray[np.uint8]:
    """Bytes start … start+count of the stream; numpy's generator runs one block ahead of its counter."""
    first, skip = divmod(start, BLOCK_ENTRIES)
    generator = np.random.Philox(key=key[0] + key[1] * _WORD, counter=first)
    num_words = -(-(skip + count) // 8)
    words = generator.random_raw(num_words).astype("<u8", copy=False)
    return words.view(np.uint8)[skip : skip + count]


def _multiply_high(a: NDArray[np.uint64], b: np.uint64) -> NDArray[np.uint64]:
    """Upper 64 bits of the 128-bit products a·b."""
    a_low, a_high, b_low, b_high = a & _LOW, a >> _HALF, b & _LOW, b >> _HALF
    middle = a_high * b_low + ((a_low * b_low) >> _HALF)
    carry = a_low * b_high + (middle & _LOW)
    return a_high * b_high + (middle >> _HALF) + (carry >> _HALF)


def _philox_word(key: tuple[int, int], counter: NDArray[np.uint64], domain: int) -> NDArray[np.uint64]:
    """First word of the Philox4x64-10 block at counter (counter_i, domain, 0, 0), for scattered counters."""
    c0, c1 = counter, np.full_like(counter, domain)
    c2, c3 = np.zeros_like(counter), np.zeros_like(counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply_high(c0, _MULTIPLIERS[0]), c0 * _MULTIPLIERS[0]
        high1, low1 = _multiply_high(c2, _MULTIPLIERS[1]), c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = high1 ^ c1 ^ np.uint64(k0), low1, high0 ^ c3 ^ np.uint64(k1), low0
        k0, k1 = (k0 + _WEYL[0]) % _WORD, (k1 + _WEYL[1]) % _WORD
    return c0


@dataclass(frozen=True)
class MaskDraw:
    """A Bernoulli mask that is named, not stored.

    Args:
        key: of its stream, from ``key_of``.
        threshold: p·2^64, below 2^64.
    """

    key: tuple[int, int]
    threshold: int

    @classmethod
    def of(cls, density: float, *coordinates: object) -> MaskDraw | None:
        """Name the mask of a density and coordinates; ``None`` if it keeps everything."""
        threshold = int(Fraction(density) * _WORD)
        return cls(_key(*coordinates), threshold) if threshold < _WORD else None

    def native(self) -> Draw:
        """Return it as the compiled kernels take it."""
        return Draw((ctypes.c_uint64 * 2)(*self.key), self.threshold >> 56, self.threshold & ((1 << 56) - 1))


def keep_mask(density: float, *coordinates: object, numel: int, start: int = 0) -> torch.Tensor:
    """Draw Bernoulli(density) for the entries start … start+numel of the stream that the coordinates name.

    Args:
        density: the probability of ``True``, in (0, 1]; exact to 2^-64.
        coordinates: what names the draw, e.g. seed, step, parameter name.
        numel: how many entries.
        start: index of the first entry, so that a shard draws its own part.
    Returns:
        bool tensor [numel] on the CPU.
    """
    draw = MaskDraw.of(density, *coordinates)
    if draw is None:
        return torch.ones(numel, dtype=torch.bool)
    if LIBRARY is not None:
        return _keep_native(draw, numel, start)
    top, rest = draw.threshold >> 56, draw.threshold & ((1 << 56) - 1)
    drawn = _stream_bytes(draw.key, start, numel)
    keep = drawn < top
    if rest:
        tied = np.flatnonzero(drawn == top)
        low_bits = _philox_word(draw.key, tied.astype(np.uint64) + np.uint64(start), domain=1) >> np.uint64(8)
        keep[tied] = low_bits < np.uint64(rest)
    return torch.from_numpy(keep)


def _keep_native(draw: MaskDraw, numel: int, start: int) -> torch.Tensor:
    assert LIBRARY is not None
    function, bits = LIBRARY.ct_keep_mask, draw.native()
    skip = start % BLOCK_ENTRIES
    keep = torch.empty(skip + numel, dtype=torch.bool)
    first, pointer = start - skip, keep.data_ptr()

    def work(i: int) -> None:
        at = i * _ENTRIES_A_TASK
        function(pointer + at, first + at, min(_ENTRIES_A_TASK, len(keep) - at), bits)

    parallel(work, -(-len(keep) // _ENTRIES_A_TASK))
    return keep[skip:]


def mask_scale_(gradient: torch.Tensor, draw: MaskDraw, scale: float) -> None:
    """Multiply a contiguous float32 gradient on the CPU with its mask and a scale, in place."""
    assert LIBRARY is not None
    function, bits = LIBRARY.ct_mask_scale, draw.native()
    pointer, numel = gradient.data_ptr(), gradient.numel()

    def work(i: int) -> None:
        start = i * _ENTRIES_A_TASK
        function(pointer + 4 * start, start, min(_ENTRIES_A_TASK, numel - start), scale, bits)

    parallel(work, -(-numel // _ENTRIES_A_TASK))


def uniform(*coordinates: object, numel: int) -> torch.Tensor:
    """Draw numbers in [0, 1), float32 [numel] on the CPU, 24 random bits each, named by the coordinates."""
    words = _stream_bytes(_key(*coordinates), 0, 4 * numel).view("<u4")
    return torch.from_numpy((words >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24))


def random_bits(*coordinates: object, numel: int, start: int = 0) -> torch.Tensor:
    """Draw whole numbers in [0, 2^16) for the entries start … start+numel of the stream that the coordinates name.

    Returns:
        int32 [numel] on the CPU.
    """
    drawn = _stream_bytes(_key(*coordinates), 2 * start, 2 * numel).view("<u2")
    return torch.from_numpy(drawn.astype(np.int32))
