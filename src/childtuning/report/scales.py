"""From numbers to places on an axis, and the numbers that are written beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from childtuning.report import numbers


@dataclass(frozen=True)
class Scale:
    """An axis.

    Attributes:
        low, high: the numbers at its ends, ``low < high``.
        log: equal ratios are equally far apart.
        ticks: the numbers that are written.
        format_fn: how.
        title: what is measured.
    """

    low: float
    high: float
    log: bool
    ticks: Sequence[float]
    format_fn: Callable[[float], str]
    title: str

    def share(self, value: float) -> float:
        """Return where a number lies: 0 at the low end, 1 at the high end."""
        low, high = self._bent(self.low), self._bent(self.high)
        return (self._bent(value) - low) / (high - low)

    def percent(self, value: float) -> str:
        """Return the same as SVG takes it across a fluid width."""
        return f"{100 * self.share(value):.4g}%"

    def times(self, factor: float) -> Scale:
        """Return the same axis, with the same text, for numbers that are so many times larger."""
        format_fn = self.format_fn
        return replace(
            self,
            low=self.low * factor,
            high=self.high * factor,
            ticks=[tick * factor for tick in self.ticks],
            format_fn=lambda tick: format_fn(tick / factor),
        )

    def _bent(self, value: float) -> float:
        return math.log10(value) if self.log else value


def fit(
    values: Iterable[float],
    title: str,
    format_fn: Callable[[float], str] | None = None,
    *,
    log: bool = False,
    most_ticks: int = 5,
    margin: float = 0.04,
) -> Scale:
    """Return an axis that holds all numbers.

    Args:
        values: what is drawn; those that are not finite are passed over.
        title: what is measured.
        format_fn: writes a tick; ``None``: with as many decimals as tell neighbours apart.
        log: logarithmic; then the numbers are above 0.
        most_ticks: how many there is room for.
        margin: free share of the axis at both ends.
    """
    known = [value for value in values if math.isfinite(value)] or [1.0]
    low, high = min(known), max(known)
    if log:
        low, high = (low / 2, high * 2) if low == high else (low, high)
        gap = (high / low) ** margin
        low, high = low / gap, high * gap
        ticks = _decades(low, high, most_ticks)
    else:
        room = (high - low) * margin if low < high else abs(high) * 0.1 or 1.0
        low, high = low - room, high + room
        ticks = _round_steps(low, high, most_ticks)
    return Scale(low, high, log, ticks, format_fn or _plain(ticks), title)


def _plain(ticks: Sequence[float]) -> Callable[[float], str]:
    gaps = [b - a for a, b in pairwise(ticks)]
    digits = max(0, -math.floor(math.log10(min(gaps)) + 1e-9)) if gaps else 2
    return lambda tick: numbers.score(tick, digits)


def _round_steps(low: float, high: float, most: int) -> list[float]:
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20):
        step = factor * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            return [float(f"{index * step:.12g}") for index in range(first, last + 1)]
    raise AssertionError("a step of 20 powers leaves few ticks")


def _decades(low: float, high: float, most: int) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [f * 10.0**power for power in range(first, last + 1) for f in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= most and (len(ticks) > 1 or factors == (1, 2, 5)):
            return ticks
    every = math.ceil((last - first + 1) / most)
    ticks = [10.0**power for power in range(first, last + 1, every)]
    return [tick for tick in ticks if low <= tick <= high]
