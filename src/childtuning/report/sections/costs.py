"""What a score costs: trained parameters, memory, time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from childtuning.report import numbers
from childtuning.report.charts.axes import Axes
from childtuning.report.charts.figure import data_table, figure, grid
from childtuning.report.evidence import Evidence, Result, Setting
from childtuning.report.markup import Markup
from childtuning.report.method_marks import MethodMarks
from childtuning.report.scales import Scale, fit
from childtuning.report.section import Section


@dataclass(frozen=True)
class _Cost:
    """A cost: its field in ``Costs``, its name, a function that reads it from a run's result, and its unit."""

    field: str
    title: str
    of_fn: Callable[[Mapping[str, Any]], float]
    unit: str = ""

    def typical(self, result: Result) -> float:
        return float(getattr(result.row.costs, self.field))

    def text(self, value: float) -> str:
        return numbers.duration(value) if self.unit == "s" else numbers.si(value, self.unit)

    def axis(self, values: Sequence[float]) -> Scale:
        log = all(value > 0 for value in values) and max(values) > 10 * min(values)
        values = values if log else [0.0, *values]  # so that small differences look small
        step, title, text_fn = 1.0, self.title, lambda tick: numbers.si(tick, self.unit, trim=True)
        if self.unit == "s":  # ticks are round numbers in the unit shown
            step, unit = numbers.time_unit(max(values))
            title, text_fn = f"{title}, {unit}", lambda tick: f"{tick:g}"
        return fit([value / step for value in values], title, text_fn, log=log, margin=0.07).times(step)


_COSTS = (
    _Cost("trained_parameters", "trained parameters", lambda result: result["trained_parameters"]),
    _Cost("peak_memory_bytes", "peak memory", lambda result: result["peak_memory_bytes"], "B"),
    _Cost("seconds", "time to choose and train", lambda r: r["fisher_seconds"] + r["train_seconds"], "s"),
)


def section(evidence: Evidence, marks: MethodMarks) -> Section | None:
    """Return scores against costs."""
    settings = [
        s
        for s in evidence.main
        if len(s.results) > 1 and any(r.row.description.best is not None for r in s.results)
    ]
    if not settings:
        return None
    shown = [result.method for setting in settings for result in setting.results]
    charts = [grid([_chart(setting, marks, cost) for cost in _COSTS]) for setting in settings]
    lead = "Large marks: means over seeds with 95 % intervals, at the median cost. Small marks: single seeds."
    return Section("costs", "Score against cost", "Cost", lead, [marks.key(shown), charts])


def _chart(setting: Setting, marks: MethodMarks, cost: _Cost) -> Markup:
    runs = [r for result in setting.results for r in result.choice.records if math.isfinite(r.score)]
    axes = Axes(
        cost.axis([float(cost.of_fn(record.result or {})) for record in runs]),
        fit(setting.scores, setting.metric),
    )
    drawn = [marks.group(one.method, _marks(axes, one, marks, cost)) for one in reversed(setting.results)]
    name = f"{setting.label}: {setting.metric} against {cost.title}"
    rows = [
        [
            result.method,
            cost.text(cost.typical(result)),
            numbers.score(result.row.description.mean),
            numbers.interval(result.row.description.interval),
        ]
        for result in setting.results
    ]
    said = [f"{method} {mean} at {spent}" for method, spent, mean, _ in rows[:6]]
    rest = f"; and {len(rows) - len(said)} more." if len(rows) > len(said) else "."
    return figure(
        setting.label,
        axes.drawing(drawn, f"{name}. {'; '.join(said)}{rest}"),
        note=f"against {cost.title}",
        data=data_table(["method", cost.title, setting.metric, "95 % interval"], rows, label=name),
        task=setting.task,
    )


def _marks(axes: Axes, result: Result, marks: MethodMarks, cost: _Cost) -> list[Markup]:
    found, typical = result.row.description, cost.typical(result)
    drawn = []
    for record in result.choice.records:
        if math.isfinite(record.score):
            spent = float(cost.of_fn(record.result or {}))
            tip = f"{result.method}, seed {record.seed}: {numbers.score(record.score, 4)}, {cost.text(spent)}"
            drawn.append(axes.point(spent, record.score, tip=tip, radius=2.5))
    if found.interval is not None:
        drawn.append(axes.upright(typical, *found.interval))
    if found.mean is not None:
        tip = f"{result.method}: mean {numbers.score(found.mean, 4)}, {cost.text(typical)}"
        drawn.append(axes.symbol(marks.shape(result.method), typical, found.mean, tip))
    return drawn
