"""Exact ranking over many score tensors where they lie, without putting them into one.

A floating-point number's bits, with the order of the negative ones turned round, sort as integers do. The k-th
largest of all is found by counting 16 bits at a time over every tensor: one pass for bf16, two for float32, four for
float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from childtuning.errors import ConfigError
from childtuning.kernels.native_ranking import NotNumbersError, fits_native_ranking, top_entries_native

_DIGIT_BITS = 16
_DIGITS = 1 << _DIGIT_BITS
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def _sortable(score: Tensor) -> Tensor:
    """Integers that order as the scores do (−0 equal to +0), flat, as wide as the scores."""
    bits = (score.reshape(-1) + 0.0).view(_INTEGERS[score.element_size()])
    return torch.where(bits >= 0, bits, bits ^ torch.iinfo(bits.dtype).max)


def _threshold(keys: Sequence[Tensor], count: int) -> tuple[int, int]:
    """Return the count-th largest key of all, and how many keys equal to it are needed."""
    num_bits = 8 * keys[0].element_size()
    prefix, needed = 0, count
    for shift in range(num_bits - _DIGIT_BITS, -1, -_DIGIT_BITS):
        first = shift == num_bits - _DIGIT_BITS
        histogram = torch.zeros(_DIGITS, dtype=torch.int64)
        for key in keys:
            candidates = key if first else key[(key >> (shift + _DIGIT_BITS)) == prefix]
            digits = (candidates >> shift).long() & (_DIGITS - 1)
            if first:
                digits ^= _DIGITS >> 1  # the sign bit: negative keys come first
            histogram += torch.bincount(digits, minlength=_DIGITS).cpu()
        at_least = histogram.flip(0).cumsum(0).flip(0)
        digit = int((at_least >= needed).nonzero()[-1])
        needed -= int(at_least[digit + 1]) if digit + 1 < _DIGITS else 0
        digit = (digit ^ (_DIGITS >> 1)) - (_DIGITS if digit < _DIGITS >> 1 else 0) if first else digit
        prefix = (prefix << _DIGIT_BITS) + digit
    return prefix, needed


def top_entries(scores: Iterable[Tensor], count: int, *, lowest: bool = False) -> list[Tensor]:
    """Find the count largest entries of all tensors together; ties go to the earlier tensor, then the lower index.

    Args:
        scores: bf16, float16, float32 or float64 tensors of any shape, all of one dtype.
        count: how many entries to take in all.
        lowest: find the smallest instead.
    Returns:
        for each tensor the flat indices taken, int32 or int64, increasing, on its device.
    Raises:
        NotNumbersError: a score is NaN.
    """
    scores = list(scores)
    if count and fits_native_ranking(scores):
        taken = top_entries_native(scores, count, lowest=lowest)
        if taken is not None:
            return taken
    for position, score in enumerate(scores):
        if score.numel() and bool(score.min().isnan()):
            raise NotNumbersError(position)
    if len(dtypes := {score.dtype for score in scores}) > 1:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ConfigError(f"scores must share one dtype, got {names}. Convert them.")
    keys = [_sortable(-score if lowest else score) for score in scores]
    if count == 0:
        return [key.new_zeros(0, dtype=torch.int64) for key in keys]
    threshold, ties_left = _threshold(keys, count)
    taken = []
    for key in keys:
        chosen = key > threshold
        if ties_left:
            ties = (key == threshold).nonzero().squeeze(1)[:ties_left]
            chosen[ties] = True
            ties_left -= len(ties)
        taken.append(chosen.nonzero().squeeze(1))
    return taken


def top_units(means: Tensor, sizes: Tensor, budget: int) -> Tensor:
    """Take units in order of their mean score, each that still fits the budget of entries.

    Args:
        means: float64 [U], the units' scores; ties go to the lower index.
        sizes: int64 [U], entries in each unit.
        budget: how many entries may be taken in all.
    Returns:
        bool [U]. The entries taken never exceed the budget, and fall short of it by less than the size of the
        smallest unit that was left.
    """
    order = torch.sort(means, descending=True, stable=True).indices
    taken = torch.zeros(len(means), dtype=torch.bool)
    while len(order):
        running = sizes[order].cumsum(0)
        num_fit = int((running <= budget).sum())
        taken[order[:num_fit]] = True
        budget -= int(running[num_fit - 1]) if num_fit else 0
        order = order[num_fit:]
        order = order[sizes[order] <= budget]
    return taken
