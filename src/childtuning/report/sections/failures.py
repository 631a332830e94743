"""The runs that ended with an error."""

from __future__ import annotations

from childtuning.compare.records import Record
from childtuning.report import numbers
from childtuning.report.evidence import Evidence
from childtuning.report.markup import Markup, el
from childtuning.report.method_marks import MethodMarks
from childtuning.report.section import Section

_UNFOLDED = 12  # runs per error shown without unfolding


def section(evidence: Evidence, marks: MethodMarks) -> Section | None:
    """Return the failed runs, grouped by error."""
    if not evidence.failed:
        return None
    by_error: dict[str, list[Record]] = {}
    for record in evidence.failed:
        by_error.setdefault(record.error or "no error was recorded", []).append(record)
    errors = sorted(by_error.items(), key=lambda item: -len(item[1]))
    entries = [
        el("div", el("p", error, class_="error"), _runs(evidence, records), class_="failure")
        for error, records in errors
    ]
    total = numbers.counted(len(evidence.failed), "run")
    verb = "is" if len(evidence.failed) == 1 else "are"
    lead = f"{total} ended with an error and {verb} not included in any figure above. --retry-failed tries again."
    return Section("failures", "Failed runs", "Failures", lead, entries)


def _runs(evidence: Evidence, records: list[Record]) -> Markup:
    links = [el("li", _link(evidence, record)) for record in records]
    shown = el("ul", links[:_UNFOLDED], class_="runs")
    if len(links) <= _UNFOLDED:
        return shown
    rest = el(
        "details", el("summary", f"{len(links) - _UNFOLDED} more"), el("ul", links[_UNFOLDED:], class_="runs")
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
