"""The chosen hyperparameters, and how much trying more of them helps."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from childtuning.report import numbers
from childtuning.report.charts.axes import Axes
from childtuning.report.charts.figure import data_table, figure, grid
from childtuning.report.evidence import Evidence, Result, Setting
from childtuning.report.markup import Markup, el
from childtuning.report.method_marks import MethodMarks
from childtuning.report.scales import fit
from childtuning.report.section import Section


def section(evidence: Evidence, marks: MethodMarks) -> Section | None:
    """Return the budget curves and the choices."""
    tuned = [
        (setting, result)
        for setting in evidence.settings
        for result in setting.results
        if len(result.choice.tried) > 1
    ]
    if not tuned:
        return None
    charts = [chart for setting in evidence.main if (chart := _chart(setting, marks))]
    content: list[Any] = []
    if charts:
        shown = [result.method for _, result in tuned]
        content += [marks.key(shown), grid(charts)]
    note = "the best values tried, by the selection score"
    if any(result.row.at_end for _, result in tuned):
        note += "; † the lowest or the highest value tried, so a better one may lie beyond"
    content.append(figure("Chosen", _chosen(tuned, marks), note=note))
    content.append(el("details", el("summary", "All values tried"), _tried(tuned), class_="more"))
    where = (
        "the reported examples"
        if evidence.comparison.get("selection") == "reported"
        else "held-out training examples"
    )
    lead = (
        f"The expected score on {where} of the best of k sets of hyperparameters drawn from those tried. The curve "
        f"of a method that needs more tuning rises more slowly."
    )
    return Section("tuning", "Hyperparameters", "Tuning", lead, content)


def _chart(setting: Setting, marks: MethodMarks) -> Markup | None:
    lines = {
        result.method: [
            (float(k + 1), value) for k, value in enumerate(result.row.expected_best) if math.isfinite(value)
        ]
        for result in setting.results
        if len(result.choice.tried) > 1
    }
    lines = {method: points for method, points in lines.items() if points}
    if not lines:
        return None
    most = max(points[-1][0] for points in lines.values())
    x = fit([1.0, most], "sets tried", lambda tick: f"{tick:.0f}", margin=0.03, most_ticks=6)
    axes = Axes(
        replace(x, ticks=[tick for tick in x.ticks if tick == int(tick)]),
        fit([value for points in lines.values() for _, value in points], f"expected {setting.metric}"),
    )
    drawn = [
        marks.group(method, axes.curves([("curve", points)]), _symbols(axes, method, points, marks))
        for method, points in reversed(lines.items())
    ]
    label = f"{setting.label}: expected {setting.metric} by number of hyperparameter sets tried"
    words = "; ".join(
        f"{method} from {points[0][1]:.3f} to {points[-1][1]:.3f}"
        for method, points in list(lines.items())[:6]
    )
    columns = ["method", *(f"best of {k}" for k in range(1, int(most) + 1))]
    rows = [
        [
            method,
            *(numbers.score(value) for _, value in points),
            *[numbers.NOTHING] * (int(most) - len(points)),
        ]
        for method, points in lines.items()
    ]
    return figure(
        setting.label,
        axes.drawing(drawn, f"{label}. {words}."),
        note="by sets tried",
        data=data_table(columns, rows, label=label),
        task=setting.task,
    )


def _symbols(axes: Axes, method: str, points: list[tuple[float, float]], marks: MethodMarks) -> list[Markup]:
    return [
        axes.symbol(marks.shape(method), k, value, f"{method}, best of {k:.0f}: {numbers.score(value, 4)}")
        for k, value in points
    ]


def _chosen(tuned: list[tuple[Setting, Result]], marks: MethodMarks) -> Markup:
    columns = list(dict.fromkeys(setting.label for setting, _ in tuned))
    cells: dict[str, dict[str, str]] = {}
    for setting, result in tuned:
        cells.setdefault(result.method, {})[setting.label] = numbers.point(
            result.row.point, result.row.at_end
        )
    rows = [
        [marks.named(method), *(cells[method].get(column, numbers.NOTHING) for column in columns)]
        for method in marks.methods
        if method in cells
    ]
    return data_table(["method", *columns], rows, left=1 + len(columns), label="Chosen hyperparameters")


def _tried(tuned: list[tuple[Setting, Result]]) -> Markup:
    names = list(
        dict.fromkeys(name for _, result in tuned for one in result.choice.tried for name in one.point)
    )
    rows = []
    for setting, result in tuned:
        for one in result.choice.tried:
            values = [
                numbers.option(one.point[name]) if name in one.point else numbers.NOTHING for name in names
            ]
            chosen = "chosen" if one.point == result.choice.point else ""
            rows.append(
                [
                    setting.label,
                    result.method,
                    *values,
                    len(one.records),
                    numbers.score(one.selection),
                    chosen,
                ]
            )
    return data_table(
        ["task", "method", *names, "runs", "selection score", ""],
        rows,
        left=2,
        label="Hyperparameters tried",
    )
