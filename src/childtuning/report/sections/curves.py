"""The training loss over the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from statistics import fmean, median

from childtuning.compare.records import Record
from childtuning.report import numbers
from childtuning.report.charts.axes import Axes
from childtuning.report.charts.figure import data_table, figure, grid
from childtuning.report.evidence import Evidence, Result, Setting
from childtuning.report.markup import Markup
from childtuning.report.method_marks import MethodMarks
from childtuning.report.scales import fit
from childtuning.report.section import Section

_MOST_POINTS = 24_000  # of all curves on a page
_MOST_BUCKETS, _FEWEST_BUCKETS = 60, 12
_MOST_SEEDS = 10  # drawn as single curves
_OUTLIER = 20  # times the median: above this the axis is logarithmic

Points = list[tuple[float, float]]


def section(evidence: Evidence, marks: MethodMarks) -> Section | None:
    """Return the learning curves."""
    settings = [
        setting
        for setting in evidence.main
        if any(_losses(r) for one in setting.results for r in one.choice.records)
    ]
    if not settings:
        return None
    lines = sum(
        min(_MOST_SEEDS, len(one.choice.records)) + 1 for setting in settings for one in setting.results
    )
    buckets = max(_FEWEST_BUCKETS, min(_MOST_BUCKETS, _MOST_POINTS // lines))
    shown = [result.method for setting in settings for result in setting.results]
    charts = [_chart(setting, buckets, marks) for setting in settings]
    lead = (
        "Training loss: the mean over seeds, with single seeds as faint lines. "
        f"Each point is an average over 1/{buckets} of the steps."
    )
    return Section("curves", "Learning curves", "Curves", lead, [marks.key(shown), grid(charts)])


def _losses(record: Record) -> Points:
    found = ((entry.get("step"), entry.get("loss")) for entry in record.curve)
    return [
        (step, loss) for step, loss in found if step is not None and loss is not None and math.isfinite(loss)
    ]


def _chart(setting: Setting, buckets: int, marks: MethodMarks) -> Markup:
    curves = {result.method: _curves(result, buckets) for result in setting.results}
    curves = {method: found for method, found in curves.items() if found[0]}
    every = [point for mean, seeds in curves.values() for line in (mean, *seeds) for point in line]
    losses = [loss for _, loss in every]
    steep = min(losses) > 0 and max(losses) > _OUTLIER * median(losses)
    axes = Axes(
        fit([step for step, _ in every], "step", lambda tick: f"{tick:,.0f}", margin=0.0),
        fit(losses, "training loss", partial(numbers.si, trim=True) if steep else None, log=steep),
    )
    drawn = [
        marks.group(
            method,
            axes.curves([*(("curve faint", seed) for seed in seeds if len(seed) > 1), ("curve", mean)]),
        )
        for method, (mean, seeds) in reversed(curves.items())
    ]
    ends = [(method, mean[0][1], mean[-1][1]) for method, (mean, _) in curves.items()]
    rows = [[method, f"{first:.3f}", f"{last:.3f}"] for method, first, last in ends]
    label = f"{setting.label}: training loss by step"
    words = "; ".join(f"{method} from {first:.3f} to {last:.3f}" for method, first, last in ends[:6])
    data = data_table(["method", "first", "last"], rows, label=label)
    return figure(
        setting.label,
        axes.drawing(drawn, f"{label}. {words}."),
        note="training loss by step",
        data=data,
        task=setting.task,
    )


def _curves(result: Result, buckets: int) -> tuple[Points, list[Points]]:
    """Return the mean curve and the curves of the seeds."""
    runs = [losses for record in result.choice.records if (losses := _losses(record))]
    if not runs:
        return [], []
    low, high = min(run[0][0] for run in runs), max(run[-1][0] for run in runs)
    width = (high - low) / buckets or 1.0
    bucketed = [_bucketed(run, low, width, buckets) for run in runs]
    mean = []
    for place in range(buckets):
        there = [line[place] for line in bucketed if place in line]
        if there:
            mean.append((fmean(step for step, _ in there), fmean(loss for _, loss in there)))
    seeds = [list(line.values()) for line in bucketed[:_MOST_SEEDS]] if len(runs) > 1 else []
    return mean, seeds


def _bucketed(
    run: Sequence[tuple[float, float]], low: float, width: float, buckets: int
) -> dict[int, tuple[float, float]]:
    places: dict[int, Points] = {}
    for step, loss in run:
        places.setdefault(min(buckets - 1, int((step - low) / width)), []).append((step, loss))
    return {
        place: (fmean(step for step, _ in points), fmean(loss for _, loss in points))
        for place, points in sorted(places.items())
    }
