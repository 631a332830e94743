"""Sums in bf16 that do not stall: each addition is rounded at random, so that it is right on average.

A bf16 number has 8 significant bits. Rounded to the nearest, a sum that is over 256 times a term is not changed by it,
however many such terms follow. Rounded up with the probability that makes the expectation right, it is unbiased.

How far the sum S of n terms of one sign strays: adding t to s rounds to one of two numbers u ≤ 2^-7 (s + t) apart,
with a variance of at most min(t·u, u²/4). By the second, n additions have at most n·2^-16·S². By the first, and by the
second where t is above 512 s, any number of them has at most 2^-7 Σ t·s ≤ 2^-8·S², to within 1 %. The standard
deviation is hence at most the lesser of 2^-8·√n and 2^-4 of the sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from childtuning.child.task_free import random_bits

_ENTRIES_AT_ONCE = {"cpu": 1 << 16}  # so that what lies between two operations stays in a cache
_ENTRIES_ON_OTHERS = 1 << 24
_LOW_BITS = 0xFFFF  # of a float32, those that bf16 has no room for


def add_rounded_(sums: Tensor, terms: Tensor, *coordinates: object) -> None:
    """Add float32 terms to bf16 sums, in place, rounding to one of the two neighbours at random.

    The chance of the upper one is the share of the way to it, to 2^-16. The random bits are a function of the
    coordinates and the entry, as those of masks are: drawn on the CPU, and the same for sums on any device.

    Args:
        sums: bf16, contiguous.
        terms: float32, of the same shape, on the same device.
        coordinates: what names the addition, e.g. seed, parameter name, number of the term.
    """
    sums, terms = sums.view(-1), terms.reshape(-1)
    size = _ENTRIES_AT_ONCE.get(sums.device.type, _ENTRIES_ON_OTHERS)
    for start in range(0, len(sums), size):
        kept = sums[start : start + size]
        exact = kept.float().add_(terms[start : start + size])
        bits = random_bits(*coordinates, numel=len(kept), start=start).to(kept.device)
        rounded = (exact.view(torch.int32) + bits).bitwise_and_(~_LOW_BITS).view(torch.float32)
        kept.copy_(torch.where(exact.isnan(), exact, rounded))  # the bits of some NaN would run over
