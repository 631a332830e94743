"""Exact ranking of scores where they lie, without putting them into one tensor.

On the CPU two passes compare float32; bf16 and float16 scores are converted a piece at a time, which is exact. The
threshold is first bracketed from a sample [Floyd and Rivest 1975]; one pass counts what lies above the bracket and
lists the few scores inside it, among which the threshold is found exactly; one pass collects. Whether the sample was
a good one decides the time, never the result.

On a GPU the k-th largest is found by bisection: a floating-point number's bits, with the order of the negative ones
turned round, sort as integers do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from childtuning import fast
from childtuning.fast.library import LIBRARY, parallel

_ENTRIES_A_PIECE = 1 << 20
_SAMPLE = 1 << 18
_DEVIATIONS = 6.0  # half a bracket's width; the threshold is outside once in 10^9
_ROOM = _ENTRIES_A_PIECE // 8  # for scores inside the bracket, by piece
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Piece:
    """Some scores that lie together: the tensor they are of, the first one's index, and themselves, flat."""

    tensor: int
    start: int
    scores: Tensor

    @property
    def size(self) -> int:
        return len(self.scores)


class NotNumbersError(ValueError):
    """A tensor of scores holds NaN; ``tensor`` says which, counted from 0."""

    def __init__(self, tensor: int) -> None:
        super().__init__(f"scores {tensor} hold NaN")
        self.tensor = tensor


def supports(scores: Sequence[Tensor]) -> bool:
    """Tell whether ``top_entries`` can rank these scores, which are of one dtype."""
    if not scores or not fast.enabled():
        return False
    if all(score.is_cuda for score in scores):
        return True
    return LIBRARY is not None and all(
        score.dtype in _DTYPES
        and score.device.type == "cpu"
        and score.layout == torch.strided
        and score.is_contiguous()
        and score.numel() < 2**31
        for score in scores
    )


def top_entries(scores: Sequence[Tensor], count: int, *, lowest: bool = False) -> list[Tensor] | None:
    """Find the count largest entries of all tensors together; ties go to the earlier tensor, then the lower index.

    Args:
        scores: tensors that it ``supports``.
        count: how many entries to take in all, at least 1.
        lowest: find the smallest instead.
    Returns:
        for each tensor the flat indices taken, increasing, on its device; ``None`` where the sample misled, which
        happens by chance, or where very many scores are nearly alike.
    Raises:
        NotNumbersError: a tensor holds NaN.
    """
    if scores[0].is_cuda:
        return _by_counting(scores, count, lowest=lowest)
    assert LIBRARY is not None
    library, sign = LIBRARY, -1.0 if lowest else 1.0
    pieces = [
        _Piece(i, start, score.detach().view(-1)[start : start + _ENTRIES_A_PIECE])
        for i, score in enumerate(scores)
        for start in range(0, score.numel(), _ENTRIES_A_PIECE)
    ]
    low, high = _bracket(pieces, count, sign)
    counts = np.zeros((len(pieces), 5), np.int64)  # above the bracket, at its ends, NaN, inside
    between: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(pieces)

    def look(i: int) -> None:
        scores, room = pieces[i].scores.float(), _ROOM
        inside = np.empty(room, np.float32)
        library.ct_bracket(
            scores.data_ptr(), len(scores), sign, low, high, counts[i].ctypes.data, inside.ctypes.data, room
        )
        between[i] = inside[: counts[i, 4]].copy()

    parallel(look, len(pieces))
    for i in np.flatnonzero(counts[:, 3]):
        raise NotNumbersError(pieces[i].tensor)
    needed = count - int(counts[:, 0].sum())
    inside = np.concatenate(between)
    if counts[:, 4].max() > _ROOM or not 0 < needed <= int(counts[:, 1:3].sum()) + len(inside):
        return None
    threshold, ties_left = _threshold(inside, needed, low, high, counts.sum(0))
    above, at = counts[:, 0].copy(), np.zeros(len(pieces), np.int64)
    for found, end in ((counts[:, 1], high), (counts[:, 2], low)):
        above += found * (end > threshold)
        at += found * (end == threshold)
    above += [int((piece > threshold).sum()) for piece in between]
    at += [int((piece == threshold).sum()) for piece in between]
    ties = np.clip(ties_left - (np.cumsum(at) - at), 0, at)
    sizes = above + ties
    owners = np.array([piece.tensor for piece in pieces], np.int64)
    totals = np.bincount(owners, sizes, minlength=len(scores)).astype(np.int64)
    taken = [torch.empty(int(total), dtype=torch.int32, device="cpu") for total in totals]
    firsts = np.cumsum(sizes) - sizes - (np.cumsum(totals) - totals)[owners]

    def collect(i: int) -> None:
        piece = pieces[i]
        scores = piece.scores.float()
        out = taken[piece.tensor].data_ptr() + 4 * int(firsts[i])
        library.ct_collect(
            scores.data_ptr(), len(scores), sign, threshold, int(ties[i]), piece.start, int(sizes[i]), out
        )

    parallel(collect, len(pieces))
    return taken


def _bracket(pieces: Sequence[_Piece], count: int, sign: float) -> tuple[float, float]:
    """Two scores between which, ends included, the count-th largest very probably lies."""
    assert LIBRARY is not None
    total = sum(piece.size for piece in pieces)
    step = max(1, total // _SAMPLE)
    sample = np.empty(sum(piece.size // step for piece in pieces), np.float32)
    end = 0
    for piece in pieces:
        size = piece.size // step
        scores = piece.scores.float()
        LIBRARY.ct_sample(scores.data_ptr(), size, step, sign, sample[end:].ctypes.data)
        end += size
    share = count / total
    spread = 0.0 if step == 1 else _DEVIATIONS * math.sqrt(share * (1 - share) * len(sample)) + len(pieces)
    rank = len(sample) - share * len(sample)  # counted from the smallest
    ends = [math.floor(rank - spread), math.ceil(rank + spread)]
    places = [min(max(end, 0), len(sample) - 1) for end in ends]
    sample.partition(places)
    low = -math.inf if ends[0] < 0 else float(sample[places[0]])
    high = math.inf if ends[1] >= len(sample) and step > 1 else float(sample[places[1]])
    return low, high


def _threshold(
    inside: NDArray[np.float32], needed: int, low: float, high: float, counts: NDArray[np.int64]
) -> tuple[float, int]:
    """The needed-th largest of what is in the bracket, and how many of the scores equal to it are needed."""
    at_high, at_low = int(counts[1]), int(counts[2])
    if needed <= at_high:
        return high, needed
    needed -= at_high
    if needed > len(inside):
        assert needed - len(inside) <= at_low
        return low, needed - len(inside)
    place = len(inside) - needed
    threshold = np.partition(inside, place)[place]
    return float(threshold), needed - int((inside > threshold).sum())


def _by_counting(scores: Sequence[Tensor], count: int, *, lowest: bool) -> list[Tensor]:
    for position, score in enumerate(scores):
        if score.numel() and bool(score.min().isnan()):
            raise NotNumbersError(position)
    keys = [_sortable(-score if lowest else score) for score in scores]

    def num_from(bound: int) -> int:
        return int(torch.stack([(key >= bound).sum().to(keys[0].device) for key in keys]).sum())

    limits = torch.iinfo(keys[0].dtype)
    low, high = limits.min, limits.max  # the count-th largest key lies between
    while low < high:
        middle = low + (high - low + 1) // 2
        low, high = (middle, high) if num_from(middle) >= count else (low, middle - 1)
    ties_left = count - (num_from(low + 1) if low < limits.max else 0)
    taken = []
    for key in keys:
        chosen = key > low
        ties = (key == low).nonzero().squeeze(1)[:ties_left]
        chosen[ties] = True
        ties_left -= len(ties)
        taken.append(chosen.nonzero().squeeze(1))
    return taken


def _sortable(score: Tensor) -> Tensor:
    """Integers that order as the scores do (−0 equal to +0), flat, as wide as the scores."""
    bits = (score.reshape(-1) + 0.0).view(_INTEGERS[score.element_size()])
    return torch.where(bits >= 0, bits, bits ^ torch.iinfo(bits.dtype).max)
