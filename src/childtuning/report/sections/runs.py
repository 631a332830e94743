"""Every run, in a table that sorts and filters, with what is needed to repeat it; the failed ones by error."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import tomli_w

from childtuning.compare.records import Record
from childtuning.report import numbers
from childtuning.report.evidence import Evidence
from childtuning.report.markup import Markup, el, raw_text
from childtuning.report.method_marks import MethodMarks
from childtuning.report.section import Section
from childtuning.report.train_command import train_words

_FIRST = 40  # rows shown until the reader asks for all
_LINKS = 12  # runs shown for each error without unfolding


def section(evidence: Evidence, marks: MethodMarks) -> Section | None:
    """Return the failed runs by error, and the table of all runs."""
    if not evidence.records:
        return None
    points = list(dict.fromkeys(name for record in evidence.records for name in record.point))
    with_start = any(record.group.start is not None for record in evidence.records)
    with_size = any(record.group.train_size is not None for record in evidence.records)
    head = [
        ("task", True),
        *([("start", True)] if with_start else []),
        *([("size", False)] if with_size else []),
    ]
    head += [
        ("method", True),
        *((name, False) for name in points),
        ("seed", False),
        ("score", False),
        ("selection", False),
    ]
    head += [("trained", False), ("memory", False), ("time", False), ("state", True)]
    rows = [
        el(
            "tr",
            _cells(record, points, with_start, with_size, marks),
            id=f"run-{record.id}",
            data_task=record.group.task,
            data_m=marks.place(record.group.method),
            hidden=place >= _FIRST,
        )
        for place, record in enumerate(evidence.records)
    ]
    table = el(
        "table",
        el("thead", el("tr", [_header(*column) for column in head])),
        el("tbody", rows),
        id="runs-table",
        aria_label="Runs",
        data_first=_FIRST,
    )
    more = None
    if len(rows) > _FIRST:
        more = el("button", f"Show all {len(rows):,} runs", type="button", id="runs-more", class_="action")
    scroll = el("div", table, class_="scroll", tabindex=0, role="region", aria_label="Runs, scrolls sideways")
    content = [_failures(evidence), _filters(evidence), scroll, more, _dialog(), _details(evidence.records)]
    lead = "Select a run to see its configuration and the command that repeats it."
    return Section("runs", "All runs", "Runs", lead, content)


def _failures(evidence: Evidence) -> Markup | None:
    """Return the failed runs, grouped by error."""
    if not evidence.failed:
        return None
    by_error: dict[str, list[Record]] = {}
    for record in evidence.failed:
        by_error.setdefault(record.error or "no error was recorded", []).append(record)
    errors = sorted(by_error.items(), key=lambda item: -len(item[1]))
    entries = [
        el("div", el("p", error, class_="error"), _links(evidence, records), class_="failure")
        for error, records in errors
    ]
    verb = "is" if len(evidence.failed) == 1 else "are"
    lead = (
        f"{numbers.counted(len(evidence.failed), 'run')} ended with an error and {verb} not included in any figure "
        f"above. --retry-failed tries again."
    )
    return el("div", el("h3", "Failed runs"), el("p", lead), entries, id="failures")


def _links(evidence: Evidence, records: list[Record]) -> Markup:
    links = [el("li", _link(evidence, record)) for record in records]
    shown = el("ul", links[:_LINKS], class_="runs")
    if len(links) <= _LINKS:
        return shown
    rest = el(
        "details", el("summary", f"{len(links) - _LINKS} more"), el("ul", links[_LINKS:], class_="runs")
    )
    return el("div", shown, rest)


def _link(evidence: Evidence, record: Record) -> Markup:
    words = [
        evidence.group_label(record.group),
        record.group.method,
        f"seed {record.seed}",
        numbers.point(record.point),
    ]
    text = ", ".join(filter(None, words))
    return el("a", text, href=f"#run-{record.id}")


def _header(name: str, is_text: bool) -> Markup:
    return el(
        "th",
        el("button", name, type="button"),
        scope="col",
        aria_sort="none",
        class_="text" if is_text else None,
    )


def _filters(evidence: Evidence) -> Markup:
    states = [
        state for state in ("done", "failed", "running", "planned", "collapsed") if evidence.count[state]
    ]
    text = el(
        "label",
        "Filter ",
        el("input", type="search", id="runs-filter", placeholder="words in any column", autocomplete="off"),
    )
    options = [el("option", f"{state} ({evidence.count[state]:,})", value=state) for state in states]
    state = el("label", "State ", el("select", el("option", "any", value=""), options, id="runs-state"))
    shown = f", the first {_FIRST} shown" if len(evidence.records) > _FIRST else ""
    found = el("output", numbers.counted(len(evidence.records), "run"), shown, id="runs-found", role="status")
    return el("div", text, state, found, class_="filters")


def _cells(
    record: Record, points: Sequence[str], with_start: bool, with_size: bool, marks: MethodMarks
) -> list[Markup]:
    group, result = record.group, record.result or {}
    link = el("a", marks.swatch(group.method), group.method, href=f"#run-{record.id}")
    cells = [el("td", group.task, class_="text")]
    if with_start:
        cells.append(el("td", group.start or "base model", class_="text"))
    if with_size:
        cells.append(
            _number(
                group.train_size if group.train_size is not None else result.get("train_examples"),
                "{:,}".format,
            )
        )
    cells.append(el("th", link, scope="row", class_="text"))
    cells += [_point(record.point.get(name)) for name in points]
    cells.append(el("td", record.seed))
    cells.append(_number(record.score, lambda v: numbers.score(v, 4)))
    cells.append(_number(record.selection, lambda v: numbers.score(v, 4)))
    cells.append(_number(result.get("trained_parameters"), numbers.si))
    cells.append(_number(result.get("peak_memory_bytes"), lambda v: numbers.si(v, "B")))
    cells.append(_number(record.seconds, numbers.duration))
    state = "collapsed" if record.collapsed else record.state
    return [*cells, el("td", state, class_=f"text state {state}")]


def _number(value: float | None, format_fn: Any) -> Markup:
    if numbers.missing(value):
        return el("td", numbers.NOTHING)
    text = format_fn(value)
    return el("td", text, data_v=None if text == str(value) else f"{value:.6g}")


def _point(value: Any) -> Markup:
    if value is None:
        return el("td", numbers.NOTHING)
    return el("td", numbers.option(value))


def _dialog() -> Markup:
    close = el("button", "Close", type="button", class_="action", id="run-close")
    content = el("h3", id="run-title"), el("div", id="run-body")
    return el("dialog", el("div", content, close), id="run-dialog", aria_labelledby="run-title")


def _details(records: Sequence[Record]) -> Markup:
    """The dialog's content for each run; what all runs have in common is stored once."""
    configs = [
        {key: value for key, value in record.config.items() if value is not None} for record in records
    ]
    shared = {
        key: value
        for key, value in configs[0].items()
        if all(key in other and other[key] == value for other in configs)
    }
    runs = {
        record.id: _detail(record, {key: value for key, value in config.items() if key not in shared})
        for record, config in zip(records, configs, strict=True)
    }
    content = {"shared": _both(shared), "runs": runs}
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace(
        "<", "\\u003c"
    )
    return el("script", raw_text(text), type="application/json", id="runs-data")


def _detail(record: Record, own: Mapping[str, Any]) -> dict[str, Any]:
    detail: dict[str, Any] = _both(own)
    result = record.result or {}
    detail["metrics"] = " · ".join(
        f"{name} {numbers.score(value, 4)}" for name, value in (result.get("metrics") or {}).items()
    )
    detail["error"] = record.error or ""
    detail["finished"] = record.finished or ""
    return {key: value for key, value in detail.items() if value}


def _both(config: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    return {"toml": tomli_w.dumps(plain), "words": train_words(config)}
