"""A chart with its title, its label for screen readers, and its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from childtuning.report.markup import Markup, el


def figure(
    title: str,
    drawing: Any,
    *,
    note: Any = None,
    data: Markup | None = None,
    task: str | None = None,
    kind: str = "",
) -> Markup:
    """Return a figure.

    Args:
        title: in a few words.
        drawing: a chart or table.
        note: what a reader needs to know to read it.
        data: its numbers as a table, collapsed.
        task: the task it belongs to, for the reader's choice of a task.
        kind: a class, for its width.
    """
    caption = el("figcaption", el("b", title), el("span", note) if note else None)
    folded = el("details", el("summary", "Numbers"), data, class_="data") if data else None
    return el("figure", caption, drawing, folded, class_=f"chart {kind}".strip(), data_task=task)


def data_table(
    columns: Sequence[Any], rows: Sequence[Sequence[Any]], *, left: int = 1, label: str | None = None
) -> Markup:
    """Return a table; the first ``left`` columns are text, the others numbers.

    Args:
        columns: headers.
        rows: cells.
        label: its accessible name.
    """
    head = el("tr", [el("th", text, scope="col", class_=_side(i, left)) for i, text in enumerate(columns)])
    body = [
        el(
            "tr",
            el("th", row[0], scope="row", class_="text"),
            [el("td", cell, class_=_side(i + 1, left)) for i, cell in enumerate(row[1:])],
        )
        for row in rows
    ]
    table = el("table", el("thead", head), el("tbody", body), aria_label=label)
    return scrolling(table, label or "Table")


def scrolling(content: Markup, label: str) -> Markup:
    """Return wide content in a box that scrolls sideways, so that the page does not have to."""
    return el("div", content, class_="scroll", tabindex=0, role="region", aria_label=label)


def grid(figures: Sequence[Markup]) -> Markup:
    """Return figures side by side, as many as fit."""
    return el("div", figures, class_="figures")


def _side(index: int, left: int) -> str | None:
    return "text" if index < left else None
