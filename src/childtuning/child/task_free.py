"""The task-free child: a fresh random mask each step (Child-Tuning_F), and the random bits that masks are made of.

Bits depend on their coordinates alone, never on the state of a generator. They come from Philox4x64-10 [Salmon et al.
2011], keyed by (seed, step, parameter name); entry i uses byte i of the stream. Another rank, a shard, or a resumed run
can therefore draw any entry on its own.

Bernoulli(p) is exact to 64 bits although one byte is drawn for most entries: entry i is kept when u_i < p·2^64, where
the top byte of u_i is its byte of the stream. Only where that byte equals the top byte of p·2^64 (one entry in 256) do
the lower 56 bits decide, and they are drawn at counter (i, 1).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from childtuning.child.eligible import as_patterns
from childtuning.child.pieces import Piece
from childtuning.child.units import Axes, Granularity
from childtuning.config import check_density
from childtuning.errors import ConfigError
from childtuning.fast import library
from childtuning.fast.library import BLOCK_ENTRIES, MaskDraw

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157))
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_WORD = 1 << 64
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def _key(*coordinates: object) -> tuple[int, int]:
    """Hash the coordinates of a draw to the 128-bit key of its stream."""
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
class TaskFree:
    """A fresh mask M_t ~ Bernoulli(p) on the gradient at every step, g ← g ⊙ M_t / p. [Xu et al. 2021, eq. 4–5]

    The masks are a pure function of (seed, step, parameter name, index): the same on every rank, under any sharding
    and after resume, and nothing about them is stored.

    Args:
        density: p, the chance that a unit is trained in a step, in (0, 1].
        seed: names the sequence of masks.
        granularity: ``element``, ``row``, ``column``, ``block`` or ``parameter``: what is drawn as one.
        always: patterns over parameter names whose gradient is never masked, such as a new head.
        row_axes: the units' axes by parameter name where they are not the usual ones: ``unit_axes``.
    Raises:
        ConfigError: the density or granularity is outside its range.
    """

    density: float
    seed: int = 0
    granularity: str = "element"
    always: tuple[str, ...] = ()
    row_axes: Mapping[str, Axes] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", check_density(self.density))
        object.__setattr__(self, "always", as_patterns(self.always))
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ConfigError(f"seed must be a whole number, got {self.seed!r}. Pass seed=0.")
        Granularity(self.granularity)
        object.__setattr__(self, "row_axes", dict(self.row_axes))

    def mask(self, name: str, shape: Sequence[int], step: int, piece: Piece | None = None) -> Tensor:
        """Draw the bool mask of one parameter at one step, of the given shape, on the CPU.

        Args:
            name: the parameter's name before any wrapper.
            shape: the parameter's shape.
            step: the optimizer step, counted from 0.
            piece: of the parameter, whose mask alone is wanted; ``None``: all of it.
        """
        granularity = self.units(name)
        if piece is None or piece.is_all or granularity.is_uncut(shape):
            kept = self.kept_units(name, shape, step, piece)
            return granularity.spread(kept, shape if piece is None else piece.local_shape)
        return piece.slice(granularity.spread(self.kept_units(name, shape, step), shape))

    def units(self, name: str) -> Granularity:
        """Return how a parameter is cut into units."""
        axis = self.row_axes.get(name)
        return Granularity(self.granularity) if axis is None else Granularity(self.granularity, axis)

    def kept_units(self, name: str, shape: Sequence[int], step: int, piece: Piece | None = None) -> Tensor:
        """Draw which units of a parameter are trained at a step: bool [num_units], on the CPU.

        Args:
            name, shape, step: as in ``mask``.
            piece: whose units alone are wanted, where each lies in one piece (``Granularity.is_uncut``).
        """
        start, num_units = (piece or Piece(tuple(shape))).runs(self.units(name))
        return keep_mask(self.density, *self._coordinates(name, step), numel=num_units, start=start)

    def draw(self, name: str, step: int) -> MaskDraw | None:
        """Return a parameter's mask at a step as the kernels take it; ``None`` if it keeps everything."""
        return mask_draw(self.density, *self._coordinates(name, step))

    def _coordinates(self, name: str, step: int) -> tuple[object, ...]:
        return "task-free", self.seed, step, name

    def __repr__(self) -> str:
        units = "" if self.granularity == "element" else f", granularity={self.granularity!r}"
        always = f", always={list(self.always)}" if self.always else ""
        return f"TaskFree(density={self.density:.4g}, seed={self.seed}{units}{always})"

    def fingerprint(self) -> str:
        """Return a text that is equal for equal masks; saved states hold it."""
        return f"TaskFree({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in fields(self))})"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready fields; ``TaskFree(**fields)`` is equal to this."""
        return {**asdict(self), "always": list(self.always)}


def mask_draw(density: float, *coordinates: object) -> MaskDraw | None:
    """Return the key and threshold of a mask; ``None`` if it keeps everything."""
    threshold = int(Fraction(density) * _WORD)
    return MaskDraw(_key(*coordinates), threshold) if threshold < _WORD else None


def keep_mask(density: float, *coordinates: object, numel: int, start: int = 0) -> Tensor:
    """Draw Bernoulli(density) for entries start … start+numel of the stream identified by the coordinates.

    Args:
        density: the probability of ``True``, in (0, 1]; exact to 2^-64.
        coordinates: identify the draw, e.g. seed, step, parameter name.
        numel: how many entries.
        start: index of the first entry, so that a shard draws its own part.
    Returns:
        bool tensor [numel] on the CPU.
    """
    draw = mask_draw(density, *coordinates)
    if draw is None:
        return torch.ones(numel, dtype=torch.bool, device="cpu")
    drawn = library.keep_mask(draw, numel, start)
    if drawn is not None:
        return drawn
    top, rest = draw.threshold >> 56, draw.threshold & ((1 << 56) - 1)
    bytes_ = _stream_bytes(draw.key, start, numel)
    keep = bytes_ < top
    if rest:
        tied = np.flatnonzero(bytes_ == top)
        low_bits = _philox_word(draw.key, tied.astype(np.uint64) + np.uint64(start), domain=1) >> np.uint64(8)
        keep[tied] = low_bits < np.uint64(rest)
    return torch.from_numpy(keep)


def uniform(*coordinates: object, numel: int) -> Tensor:
    """Draw numbers in [0, 1), float32 [numel] on the CPU, 24 random bits each, identified by the coordinates."""
    words = _stream_bytes(_key(*coordinates), 0, 4 * numel).view("<u4")
    return torch.from_numpy((words >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24))


def random_bits(*coordinates: object, numel: int, start: int = 0) -> Tensor:
    """Draw integers in [0, 2^16) for entries start … start+numel of the stream identified by the coordinates.

    Returns:
        int32 [numel] on the CPU.
    """
    drawn = _stream_bytes(_key(*coordinates), 2 * start, 2 * numel).view("<u2")
    return torch.from_numpy(drawn.astype(np.int32))
