"""How scores grow with the number of training examples."""

from __future__ import annotations

import math

from childtuning.report import numbers
from childtuning.report.charts.axes import Axes
from childtuning.report.charts.figure import data_table, figure, grid
from childtuning.report.evidence import Evidence, Result, Setting
from childtuning.report.markup import Markup
from childtuning.report.method_marks import MethodMarks
from childtuning.report.scales import fit
from childtuning.report.section import Section

_APART = 1.025  # factor between neighbouring methods, so that they do not hide each other


def section(evidence: Evidence, marks: MethodMarks) -> Section | None:
    """Return score against training size."""
    charts, shown = [], []
    for task in evidence.tasks:
        settings = [s for s in evidence.settings if s.task == task and s.start is None]
        if len({setting.examples for setting in settings}) > 1:
            settings.sort(key=lambda setting: setting.examples)
            charts.append(_chart(task, settings, evidence.methods, marks))
            shown += [result.method for setting in settings for result in setting.results]
    if not charts:
        return None
    lead = "Means over seeds with 95 % intervals. Methods with the same training size are drawn side by side."
    return Section("sizes", "Score against training size", "Size", lead, [marks.key(shown), grid(charts)])


def _chart(task: str, settings: list[Setting], methods: list[str], marks: MethodMarks) -> Markup:
    by_method: dict[str, list[tuple[int, Result]]] = {}
    for setting in settings:
        for result in setting.results:
            by_method.setdefault(result.method, []).append((setting.examples, result))
    names = [method for method in methods if method in by_method]
    shift = {
        name: _APART ** (place - (len(names) - 1) / 2) if len(names) <= 12 else 1.0
        for place, name in enumerate(names)
    }
    sizes = [setting.examples * shift[name] for setting in settings for name in (names[0], names[-1])]
    axes = Axes(
        fit(sizes, "training examples", lambda tick: f"{tick:,.0f}", log=True),
        fit([score for setting in settings for score in setting.scores], settings[0].metric),
    )
    drawn = [marks.group(name, _marks(axes, name, by_method[name], shift[name], marks)) for name in names]
    columns = ["method", *(f"{setting.examples:,}" for setting in settings)]
    rows = []
    for name in names:
        means = {size: numbers.score(result.row.description.mean) for size, result in by_method[name]}
        rows.append([name, *(means.get(setting.examples, numbers.NOTHING) for setting in settings)])
    label = f"{task}: {settings[0].metric} against training examples"
    words = "; ".join(f"{row[0]} {', '.join(row[1:])}" for row in rows[:6])
    drawing = axes.drawing(drawn, f"{label} ({', '.join(columns[1:])}). {words}.")
    return figure(
        task,
        drawing,
        note=f"{settings[0].metric} by training examples",
        data=data_table(columns, rows, label=label),
        task=task,
    )


def _marks(
    axes: Axes, name: str, found: list[tuple[int, Result]], shift: float, marks: MethodMarks
) -> list[Markup]:
    drawn, means = [], []
    for size, result in found:
        at, description = size * shift, result.row.description
        for record in result.choice.records:
            if math.isfinite(record.score):
                tip = f"{name}, {size:,} examples, seed {record.seed}: {numbers.score(record.score, 4)}"
                drawn.append(axes.point(at, record.score, tip=tip, radius=2))
        if description.interval is not None:
            drawn.append(axes.upright(at, *description.interval))
        if description.mean is not None:
            means.append((at, description.mean))
            tip = f"{name}, {size:,} examples: mean {numbers.score(description.mean, 4)}"
            drawn.append(axes.symbol(marks.shape(name), at, description.mean, tip))
    if len(means) > 1:
        drawn.insert(0, axes.curves([("curve", means)]))
    return drawn
