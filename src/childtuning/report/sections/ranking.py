"""The ranking of the methods, on each task and across tasks."""

from __future__ import annotations

from typing import Any

from childtuning.compare.summary import Average, significance
from childtuning.report import numbers
from childtuning.report.charts.figure import figure, scrolling
from childtuning.report.charts.forest import forest
from childtuning.report.evidence import Across, Evidence, Setting
from childtuning.report.findings import noise
from childtuning.report.markup import Markup, el
from childtuning.report.method_marks import LONG, MethodMarks
from childtuning.report.section import Section
from childtuning.report.sections.how_to_read import how_to_read

_SIGNS = {1: "▲", -1: "▼", 0: ""}
_SIGN_WORDS = {1: "significantly better", -1: "significantly worse", 0: ""}


def section(evidence: Evidence, marks: MethodMarks) -> Section | None:
    """Return the ranking."""
    if not evidence.ranked:
        return None
    first = {id(setting) for setting in evidence.main}
    content: list[Any] = []
    for place, across in enumerate(evidence.across):
        drawn = _across(across, marks, evidence.baseline)
        content.append(_folded(across.label, drawn) if place else drawn)
    for setting in evidence.ranked:
        drawn = _ranking(setting, marks, evidence.baseline)
        if id(setting) not in first:
            drawn = _folded(setting.label, drawn, setting.task)
        content.append(drawn)
    content.append(how_to_read(evidence))
    return Section("ranking", "Ranking", "Ranking", _lead(evidence), content)


def _folded(label: str, drawn: Markup, task: str | None = None) -> Markup:
    return el("details", el("summary", label), drawn, class_="more", data_task=task)


def _lead(evidence: Evidence) -> str:
    text = "Each dot is a run with its own seed, the vertical line is the mean, and the bar is its 95 % interval."
    if any(row.paired for row in evidence.rows):
        text += f" The dashed line is the mean of {evidence.baseline}."
    return text


def _ranking(setting: Setting, marks: MethodMarks, baseline: str | None) -> Markup:
    examples = numbers.counted(setting.examples, "training example")
    note = f"{setting.metric}, {examples}, {noise(setting.eval_examples, setting.standard_error)}"
    return figure(setting.label, forest(setting, marks, baseline), note=note, task=setting.task, kind="wide")


def _across(across: Across, marks: MethodMarks, baseline: str | None) -> Markup:
    compared = any(average.paired for average in across.averages)
    columns = [
        "method",
        "mean",
        *(
            [f"minus {baseline if len(baseline or '') <= LONG else 'baseline'}", "95 % interval", "p (Holm)"]
            if compared
            else []
        ),
    ]
    headers = [
        el("th", text, scope="col", class_=None if place else "text") for place, text in enumerate(columns)
    ]
    headers += [el("th", one.task, el("small", one.metric), scope="col") for one in across.settings]
    body = []
    for average in across.averages:
        name = el("th", marks.named(average.method), scope="row", class_="text")
        cells = [el("td", _bold(numbers.score(average.mean), average.method in across.standing.clear))]
        if compared:
            cells += _difference(average, significance(average))
        cells += [_cell(average.method, setting) for setting in across.settings]
        class_ = "best" if average.method in across.standing.clear else None
        body.append(el("tr", name, cells, data_m=marks.place(average.method), class_=class_))
    table = el(
        "table", el("thead", el("tr", headers)), el("tbody", body), class_="across", aria_label=across.label
    )
    tasks = numbers.listed([setting.task for setting in across.settings], 8)
    return figure(across.label, scrolling(table, across.label), note=f"mean of the means on {tasks}")


def _difference(average: Average, sign: int) -> list[Markup]:
    paired = average.paired
    if paired is None:
        return [el("td"), el("td"), el("td")]
    return [
        el("td", numbers.difference(paired.difference), _sign(sign)),
        el("td", numbers.interval(paired.interval, numbers.difference), class_="range"),
        el("td", numbers.p_value(average.p_corrected)),
    ]


def _cell(method: str, setting: Setting) -> Markup:
    result = next((one for one in setting.results if one.method == method), None)
    if result is None:
        return el("td", numbers.NOTHING)
    text = numbers.score(result.row.description.mean)
    return el("td", _bold(text, method in setting.standing.clear), _sign(result.sign))


def _bold(text: str, is_clear: bool) -> Markup | str:
    return el("b", text) if is_clear else text


def _sign(sign: int) -> Markup | None:
    if not sign:
        return None
    return el(
        "span",
        " ",
        _SIGNS[sign],
        class_="better" if sign > 0 else "worse",
        role="img",
        aria_label=_SIGN_WORDS[sign],
        title=_SIGN_WORDS[sign],
    )
