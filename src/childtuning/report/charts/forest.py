"""The ranking of one setting: a table whose rows show every seed, the mean and its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

from childtuning.compare.records import Record
from childtuning.report import numbers
from childtuning.report.evidence import Result, Setting
from childtuning.report.markup import Markup, el
from childtuning.report.method_marks import LONG, MethodMarks
from childtuning.report.scales import Scale, fit

_HEIGHT = 34
_OFFSETS = (0, -6, 6, -3, 3, -9, 9)  # so that dots of equal scores do not hide each other
_VERDICTS = {1: ("better", "better"), -1: ("worse", "worse"), 0: ("open", "no clear difference")}


def forest(setting: Setting, marks: MethodMarks, baseline: str | None) -> Markup:
    """Return the ranking.

    Args:
        setting: what is ranked.
        marks: the marks of the methods.
        baseline: the method whose mean the others are compared with.
    """
    scale = fit(setting.scores, setting.metric, most_ticks=4)
    compared = any(result.row.paired for result in setting.results)
    beside = next((result for result in setting.results if result.method == baseline), None)
    reference = beside.row.description.mean if beside else None
    head = el(
        "tr",
        [
            el("th", text, scope="col", class_=class_)
            for text, class_ in _columns(setting, baseline if compared else None)
        ],
    )
    rows = [
        _row(result, setting, scale, marks, reference, baseline if compared else None)
        for result in setting.results
    ]
    table = el(
        "table",
        el("thead", head, _axis(scale, 2 + 3 * compared)),
        el("tbody", rows),
        class_="forest",
        style=f"--name:{min(LONG, max(len(result.method) for result in setting.results))}ch",
        aria_label=f"Ranking on {setting.label}",
    )
    return table


def _columns(setting: Setting, baseline: str | None) -> list[tuple[str, str]]:
    columns = [
        ("method", "text"),
        (f"{setting.metric}: each seed, mean, 95 % interval", "strip"),
        ("mean", "mean"),
    ]
    columns.append(("95 % interval", "range"))
    if baseline is not None:
        columns += [
            (f"minus {baseline if len(baseline) <= LONG else 'baseline'}", "delta"),
            ("p (Holm)", "p"),
            ("", "verdict"),
        ]
    return columns


def _axis(scale: Scale, after: int) -> Markup:
    texts = [
        el("text", scale.format_fn(tick), x=scale.percent(tick), y=11, class_="x") for tick in scale.ticks
    ]
    svg = el("svg", el("g", texts, class_="grid"), width="100%", height=14, class_="ruler")
    cells = el("td"), el("td", svg, class_="strip"), [el("td") for _ in range(after)]
    return el("tr", cells, class_="scale", aria_hidden="true")


def _row(
    result: Result,
    setting: Setting,
    scale: Scale,
    marks: MethodMarks,
    reference: float | None,
    baseline: str | None,
) -> Markup:
    found = result.row.description
    strip = _strip(result, scale, reference)
    cells = [
        el("th", marks.named(result.method), _troubles(result), scope="row", class_="text"),
        el("td", strip, class_=f"strip {marks.colour(result.method)}"),
        el("td", numbers.score(found.mean), class_="mean"),
        el("td", numbers.interval(found.interval), class_="range"),
    ]
    if baseline is not None:
        cells += _comparison(result, baseline)
    class_ = "best" if result.method in setting.standing.clear else None
    return el("tr", cells, data_m=marks.place(result.method), class_=class_)


def _comparison(result: Result, baseline: str) -> list[Markup]:
    paired = result.row.paired
    if paired is None:
        word = "baseline" if result.method == baseline else ""
        return [el("td", class_="delta"), el("td", class_="p"), el("td", word, class_="verdict")]
    class_, word = _VERDICTS[result.sign]
    if result.row.p_corrected is None:
        class_, word = "open", _untested(paired.num, paired.num_nan)
    return [
        el("td", numbers.difference(paired.difference), class_="delta"),
        el("td", numbers.p_value(result.row.p_corrected), class_="p"),
        el("td", el("span", word, class_=f"badge {class_}"), class_="verdict"),
    ]


def _untested(num: int, num_nan: int) -> str:
    return "a run has no score" if num_nan else f"{numbers.counted(num, 'seed')}: no test"


def _troubles(result: Result) -> Markup | None:
    found = result.row.description
    counts = ((found.num_collapsed - found.num_nan, "collapsed"), (found.num_nan, "without a score"))
    words = [f"{count} of {found.num} {what}" for count, what in counts if count]
    return el("small", ", ".join(words), class_="trouble") if words else None


def _strip(result: Result, scale: Scale, reference: float | None) -> Markup:
    found, middle = result.row.description, _HEIGHT / 2
    ticks = [scale.percent(tick) for tick in scale.ticks]
    drawn = [el("g", [el("line", x1=at, x2=at, y2=_HEIGHT) for at in ticks], class_="grid")]
    if reference is not None:
        at = scale.percent(reference)
        drawn.append(el("line", x1=at, x2=at, y2=_HEIGHT, class_="reference"))
    if found.interval is not None:
        low, high = map(scale.percent, found.interval)
        drawn.append(el("line", x1=low, x2=high, y1=middle, y2=middle, class_="interval"))
    drawn += _dots(result.choice.records, scale, middle)
    if found.mean is not None:
        at = scale.percent(found.mean)
        drawn.append(el("line", x1=at, x2=at, y1=middle - 10, y2=middle + 10, class_="mean"))
    return el("svg", drawn, width="100%", height=_HEIGHT, role="img", aria_label=_in_words(result))


def _dots(records: Sequence[Record], scale: Scale, middle: float) -> list[Markup]:
    dots = []
    for place, record in enumerate(records):
        if math.isfinite(record.score):
            dots.append(
                el(
                    "circle",
                    cx=scale.percent(record.score),
                    cy=middle + _OFFSETS[place % len(_OFFSETS)],
                    r=3,
                    class_="seed collapsed" if record.collapsed else "seed",
                    data_tip=f"{record.group.method}, seed {record.seed}: {numbers.score(record.score, 4)}",
                )
            )
    return dots


def _in_words(result: Result) -> str:
    found = result.row.description
    words = [f"{result.method}: mean {numbers.score(found.mean)}"]
    if found.interval is not None:
        words.append(f"95 % interval {numbers.interval(found.interval)}")
    if found.best is not None and found.worst is not None:
        words.append(
            f"{numbers.counted(found.num, 'seed')} from {numbers.score(found.worst)} to {numbers.score(found.best)}"
        )
    return ", ".join(words)
