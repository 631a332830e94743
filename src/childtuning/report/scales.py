"""Map numbers to positions on an axis, and choose the ticks."""

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
        log: logarithmic, so that equal ratios have equal distances.
        ticks: the labelled numbers.
        format_fn: formats a tick.
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
        """Return the same as a percentage, for SVG of variable width."""
        return f"{100 * self.share(value):.4g}%"

    def times(self, factor: float) -> Scale:
        """Return the same axis, with the same labels, for numbers that are ``factor`` times larger."""
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
    """Return an axis that contains all numbers.

    Args:
        values: the drawn values; those that are not finite are ignored.
        title: what is measured.
        format_fn: formats a tick; ``None``: use enough decimals to distinguish neighbouring ticks.
        log: logarithmic; all numbers must then be above 0.
        most_ticks: the maximum number of ticks.
        margin: share of the axis left free at each end.
    """
    known = [value for value in values if math.isfinite(value)] or [1.0]
    low, high = min(known), max(known)
    are_equal = math.isclose(low, high)  # but for the rounding of a mean
    if log:
        low, high = (low / 2, high * 2) if are_equal else (low, high)
        gap = (high / low) ** margin
        low, high = low / gap, high * gap
        ticks = _decades(low, high, most_ticks)
    else:
        room = abs(high) * 0.1 or 1.0 if are_equal else (high - low) * margin
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
