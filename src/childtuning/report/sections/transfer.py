"""How well training on one task transfers to another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from childtuning.report import numbers
from childtuning.report.charts.figure import figure, grid
from childtuning.report.charts.heat import heat_table, span
from childtuning.report.evidence import Evidence
from childtuning.report.markup import Markup
from childtuning.report.method_marks import MethodMarks
from childtuning.report.section import Section

_BASE = "base model"
Matrix = tuple[list[str], list[str], list[list[float | None]]]


def section(evidence: Evidence, marks: MethodMarks) -> Section | None:
    """Return transfer matrices: to other tasks' examples, and to other tasks with a new head."""
    content: list[Any] = []
    domains = _domains(evidence)
    if domains:
        note = "mean over seeds on other tasks' examples"
        content.append(_figures(domains, "trained on ↓ measured on →", note, by_column=False))
    tasks = _tasks(evidence)
    if tasks:
        note = "mean over seeds, by the task of the tuned network that it starts from"
        content.append(_figures(tasks, "start ↓ new head on →", note, by_column=True))
    if not content:
        return None
    scope = (
        "all matrices" if domains and not tasks else "each column" if not domains else "each kind of matrix"
    )
    lead = f"Deeper shades are higher scores, on one scale for {scope}."
    return Section("transfer", "Transfer", "Transfer", lead, content)


def _figures(matrices: dict[str, Matrix], corner: str, note: str, *, by_column: bool) -> Markup:
    if len(matrices) > 1 and all(len(rows) == 1 for rows, _, _ in matrices.values()):
        matrices = _joined(matrices)
        corner = f"method ↓ {corner.split('↓')[1].strip()}"
    lines = [line for _, _, values in matrices.values() for line in values]
    figures = []
    for title, (rows, columns, values) in matrices.items():
        low, high = span(lines)
        if by_column:  # the metrics of columns differ
            low, high = zip(*(span([column]) for column in zip(*values, strict=True)), strict=True)
        label = f"{title}: {note}"
        table = heat_table(
            label, rows, columns, values, numbers.score, low=low, high=high, corner=corner, own=True
        )
        figures.append(figure(title, table, note=note, kind="fitted"))
    return grid(figures)


def _joined(matrices: dict[str, Matrix]) -> dict[str, Matrix]:
    """Return matrices of one row each as one matrix with a row for each method."""
    columns = list(dict.fromkeys(name for _, names, _ in matrices.values() for name in names))
    values = []
    for _, names, (line,) in matrices.values():
        known = dict(zip(names, line, strict=True))
        values.append([known.get(name) for name in columns])
    title = " and ".join(dict.fromkeys(rows[0] for rows, _, _ in matrices.values()))
    return {title: (list(matrices), columns, values)}


def _domains(evidence: Evidence) -> dict[str, Matrix]:
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for setting in evidence.settings:
        for result in setting.results:
            runs = [record.elsewhere for record in result.choice.records]
            others = list(dict.fromkeys(name for run in runs for name in run))
            if others:
                scores = {setting.task: result.row.description.mean}
                scores |= {name: _mean([run.get(name, math.nan) for run in runs]) for name in others}
                found.setdefault(result.method, {})[setting.label] = scores
    return {
        method: _matrix(rows, list(rows), evidence.tasks)
        for method, rows in _ordered(found, evidence.methods)
    }


def _tasks(evidence: Evidence) -> dict[str, Matrix]:
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    started = any(setting.start is not None for setting in evidence.settings)
    for setting in evidence.settings:
        for result in setting.results:
            # From the base model, only `head` is comparable with the others: it too trains a head on a frozen body.
            if setting.start is not None or (started and result.method == "head"):
                rows = found.setdefault(result.method, {})
                rows.setdefault(setting.start or _BASE, {})[setting.task] = result.row.description.mean
    starts = [_BASE, *evidence.tasks]
    return {
        method: _matrix(rows, sorted(rows, key=lambda start: _place(start, starts)), evidence.tasks)
        for method, rows in _ordered(found, evidence.methods)
    }


def _ordered(found: dict[str, Any], methods: Sequence[str]) -> list[tuple[str, Any]]:
    return [(method, found[method]) for method in methods if method in found]


def _matrix(rows: dict[str, dict[str, float | None]], names: Sequence[str], tasks: Sequence[str]) -> Matrix:
    columns = list(dict.fromkeys(column for name in names for column in rows[name]))
    columns.sort(key=lambda column: _place(column, tasks))
    return list(names), columns, [[rows[name].get(column) for column in columns] for name in names]


def _place(name: str, order: Sequence[str]) -> int:
    return order.index(name) if name in order else len(order)


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values and all(map(math.isfinite, values)) else None
