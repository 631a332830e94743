"""Rank scores that several processes hold in pieces, where they lie: the same entries or units on every process.

The count-th largest score is found digit by digit: the processes add up how many of their scores have each value of
the next 11 bits, so that a process sends a few histograms in place of its scores. Ties go to the earlier parameter,
then the lower index, as in one process. The indices that are taken go to every process, since a ``Child`` holds all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from childtuning.child.pieces import Piece, is_sharded, local_of, piece_of
from childtuning.child.units import Granularity
from childtuning.fast.ranking import NotNumbersError
from childtuning.ranks import Ranks

_DIGIT = 11  # bits
_UNSIGNED = {4: np.uint32, 8: np.uint64}


def holders(scores: Mapping[str, Tensor]) -> Ranks:
    """Return the processes that hold the pieces of sharded scores; this one alone where none is sharded."""
    return next((piece_of(name, s).ranks for name, s in scores.items() if is_sharded(s)), Ranks())


def unit_sums(name: str, score: Tensor, granularity: Granularity) -> Tensor:
    """Add up each unit's scores in float64, over all processes: [num_units], on the CPU."""
    piece = piece_of(name, score)
    if piece.is_all:
        return granularity.sums(score).cpu()
    local = local_of(score)
    whole = torch.zeros(piece.shape, dtype=local.dtype, device=local.device)
    piece.slice(whole).copy_(local)
    return piece.ranks.sum_(granularity.sums(whole)).cpu()


def top_entries(
    scores: Mapping[str, Tensor], count: int, ranks: Ranks, *, lowest: bool = False
) -> list[Tensor]:
    """Find the count largest entries of all parameters together; ties go to the earlier one, then the lower index.

    Args:
        scores: by parameter name, of one dtype; what is not sharded is held by every process.
        count: how many entries to take in all.
        ranks: the processes that hold them.
        lowest: find the smallest instead.
    Returns:
        for each parameter the flat indices taken, int64, increasing, on every process.
    Raises:
        NotNumbersError: a score is NaN.
    """
    pieces = [piece_of(name, score) for name, score in scores.items()]
    held = [_held(score, piece, ranks) for score, piece in zip(scores.values(), pieces, strict=True)]
    missing = ranks.max_(
        torch.tensor([int(np.isnan(one).any()) for one in held], dtype=torch.int32, device="cpu")
    )
    if bool(missing.any()):
        raise NotNumbersError(int(missing.argmax()))
    keys = [_sortable(-one if lowest else one) for one in held]
    threshold, num_ties = _threshold(keys, count, ranks)
    ties = torch.zeros(len(keys), ranks.size, dtype=torch.int64, device="cpu")
    ties[:, ranks.rank] = torch.tensor([int((key == threshold).sum()) for key in keys], device="cpu")
    ranks.sum_(ties)
    before = ties.flatten().cumsum(0).view_as(ties) - ties
    taken = []
    for position, (key, piece) in enumerate(zip(keys, pieces, strict=True)):
        chosen = key > threshold
        free = max(0, num_ties - int(before[position, ranks.rank]))
        chosen[np.flatnonzero(key == threshold)[:free]] = True
        mine = np.flatnonzero(chosen) + piece.offset
        whole = np.concatenate(
            ranks.gather(mine.astype(np.int32 if math.prod(piece.shape) < 2**31 else np.int64))
        )
        taken.append(torch.from_numpy(whole.astype(np.int64)))
    return taken


def _held(score: Tensor, piece: Piece, ranks: Ranks) -> NDArray:
    """Return what this process answers for: its piece, or, as the first one, all of what is not sharded."""
    local = local_of(score).detach().reshape(-1).cpu()
    local = local.float() if local.element_size() < 4 else local
    return local.numpy()[: 0 if piece.is_all and ranks.rank else None]


def _sortable(score: NDArray) -> NDArray:
    """Return unsigned integers that order as the scores do (−0 equal to +0)."""
    kind = _UNSIGNED[score.itemsize]
    bits = (score + score.dtype.type(0)).view(kind)
    top = kind(1) << kind(8 * score.itemsize - 1)
    return np.where(bits & top, ~bits, bits | top)


def _threshold(keys: list[NDArray], count: int, ranks: Ranks) -> tuple[int, int]:
    """Return the count-th largest key of all processes, and how many of the keys equal to it are needed."""
    width = 8 * keys[0].itemsize if keys else 32
    prefix, left = 0, count
    rest = keys
    while width:
        digit = min(_DIGIT, width)
        width -= digit
        histogram = torch.zeros(1 << digit, dtype=torch.int64, device="cpu")
        for key in rest:
            digits = (key >> key.dtype.type(width)) & key.dtype.type((1 << digit) - 1)
            histogram += torch.from_numpy(np.bincount(digits.astype(np.int64), minlength=1 << digit))
        from_top = ranks.sum_(histogram).flip(0).cumsum(0)
        place = int((from_top < left).sum())
        left -= int(from_top[place - 1]) if place else 0
        value = (1 << digit) - 1 - place
        prefix = prefix << digit | value
        rest = [key[(key >> key.dtype.type(width)) == key.dtype.type(prefix)] for key in rest]
    return prefix, left
