"""Heat maps: tables of numbers with shaded cells."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from childtuning.report.charts.figure import scrolling
from childtuning.report.markup import Markup, el
from childtuning.report.numbers import missing

# In per cent. With the two end colours in page.css, black text is readable below this value and white text from it on
# in light mode, and vice versa in dark mode.
_DEEP_FROM = 66


def heat_table(
    label: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    format_fn: Callable[[float], str],
    *,
    low: float | Sequence[float],
    high: float | Sequence[float],
    corner: str = "",
    own: bool = False,
) -> Markup:
    """Return a heat map.

    Args:
        label: its accessible name.
        rows, columns: their names.
        values: by row and column; ``None`` or NaN for an empty cell.
        format_fn: formats a number.
        low, high: the numbers of the lightest and the darkest shade, for all columns or for each one.
        corner: what the rows and columns are.
        own: frame the cells whose row and column have the same name.
    """
    lows = low if isinstance(low, Sequence) else [low] * len(columns)
    highs = high if isinstance(high, Sequence) else [high] * len(columns)
    head = el("tr", el("th", corner, scope="col"), [el("th", name, scope="col") for name in columns])
    body = []
    for name, line in zip(rows, values, strict=True):
        cells = [
            _cell(value, format_fn, low, high, own and name == column)
            for column, value, low, high in zip(columns, line, lows, highs, strict=True)
        ]
        body.append(el("tr", el("th", name, scope="row", title=name), cells))
    table = el("table", el("thead", head), el("tbody", body), class_="heat", aria_label=label)
    return scrolling(table, label)


def span(values: Sequence[Sequence[float | None]]) -> tuple[float, float]:
    """Return the smallest and the largest number of a heat map, or (0, 1) if there is none."""
    known = [value for line in values for value in line if value is not None and math.isfinite(value)]
    return (min(known), max(known)) if known else (0.0, 1.0)


def _cell(
    value: float | None, format_fn: Callable[[float], str], low: float, high: float, own: bool
) -> Markup:
    if missing(value):
        return el("td", class_="none")
    shade = 0.5 if high <= low else min(1.0, max(0.0, (value - low) / (high - low)))  # type: ignore[operator]
    percent = round(100 * shade)
    names = [name for name, so in (("deep", percent >= _DEEP_FROM), ("own", own)) if so]
    return el("td", format_fn(value), style=f"--v:{percent}%", class_=" ".join(names) or None)  # type: ignore[arg-type]
