"""Format numbers for readers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from childtuning.compare.statistics import Description
from childtuning.compare.summary import SHOWN_DIGITS
from childtuning.errors import counted as counted

NOTHING = "–"  # where there is no number
_STEPS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def score(value: float | None, digits: int = SHOWN_DIGITS) -> str:
    """Return a score with a fixed number of decimals."""
    return NOTHING if missing(value) else f"{value:.{digits}f}".replace("-", "−")


def difference(value: float | None, digits: int = SHOWN_DIGITS) -> str:
    """Return a difference of scores with its sign."""
    if missing(value):
        return NOTHING
    return f"{value:+.{digits}f}".replace("-", "−")


def mean_and_sd(found: Description) -> str:
    """Return mean ± standard deviation; the mean alone for one run, which has no spread."""
    mean = score(found.mean)
    return mean if found.sd is None or found.num < 2 else f"{mean} ± {score(found.sd)}"


def interval(ends: tuple[float, float] | None, write_fn: Callable[[float], str] = score) -> str:
    """Return the two ends of an interval."""
    return NOTHING if ends is None else f"{write_fn(ends[0])} … {write_fn(ends[1])}"


def p_value(value: float | None) -> str:
    """Return a p value; small values as a bound."""
    if missing(value):
        return NOTHING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"  # type: ignore[operator]


def si(value: float | None, unit: str = "", *, trim: bool = False) -> str:
    """Return three digits with an SI prefix: ``22.7 M``, ``1.80 GB``; ``trim`` drops trailing zeros."""
    if missing(value):
        return NOTHING
    if value == 0:
        return "0"
    size = abs(value)  # type: ignore[arg-type]
    for step, prefix in _STEPS:
        if size >= 0.9995 * step:
            return f"{_three(value / step, trim)} {prefix}{unit}"  # type: ignore[operator]
    return f"{_three(value, trim or value == round(value))} {unit}".rstrip()  # type: ignore[arg-type]


def duration(seconds: float | None) -> str:
    """Return a duration in a suitable unit: ``42.0 s``, ``3.50 min``, ``2.10 h``."""
    if missing(seconds):
        return NOTHING
    step, unit = time_unit(seconds)  # type: ignore[arg-type]
    return f"{_three(seconds / step)} {unit}"  # type: ignore[operator]


def time_unit(seconds: float) -> tuple[float, str]:
    """Return the seconds per suitable unit for a duration, and the unit's name."""
    for step, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 1.5 * step:
            return step, unit
    return 1.0, "s"


def share(value: float | None) -> str:
    """Return a share in per cent, with enough digits to distinguish it from none and from all."""
    if missing(value):
        return NOTHING
    percent = 100 * value  # type: ignore[operator]
    if 0 < percent < 0.1:
        return "< 0.1 %"
    if 99.9 < percent < 100:
        return "> 99.9 %"
    return f"{percent:.0f} %" if percent in (0, 100) or percent >= 10 else f"{percent:.1f} %"


def option(value: Any) -> str:
    """Return a hyperparameter's value as a user writes it."""
    if not isinstance(value, float):
        return str(value)
    text = f"{value:g}"
    return re.sub(r"e([-+])0*", r"e\1", text).replace("e+", "e")


def point(values: Mapping[str, Any], marked: Collection[str] = ()) -> str:
    """Return hyperparameters as a short phrase; those in ``marked`` get a dagger."""
    return ", ".join(
        f"{name} {option(value)}{'†' if name in marked else ''}" for name, value in values.items()
    )


def listed(names: Sequence[str], most: int = 4) -> str:
    """Return names as a phrase: ``a, b and c``; beyond ``most`` names, the number of others."""
    if len(names) > most:
        return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} others"
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def missing(value: float | None) -> bool:
    """Whether there is no number."""
    return value is None or math.isnan(value)


def _three(value: float, trim: bool = False) -> str:
    if value == 0:
        return "0"
    value = float(f"{value:.3g}")
    digits = max(0, 2 - math.floor(math.log10(abs(value)) + 1e-9))
    text = f"{value:.{min(digits, 4)}f}"
    return text.rstrip("0").rstrip(".") if trim and "." in text else text
