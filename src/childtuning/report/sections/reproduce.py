"""How to reproduce the numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from childtuning.report import numbers
from childtuning.report.charts.figure import data_table
from childtuning.report.evidence import Evidence
from childtuning.report.markup import el
from childtuning.report.method_marks import MethodMarks
from childtuning.report.section import Section

_TYPED = ("command", "commands")


def section(evidence: Evidence, marks: MethodMarks) -> Section | None:
    """Return command, settings and environment."""
    content: list[Any] = [
        el(
            "div",
            el("pre", el("code", command)),
            el("button", "Copy", type="button", class_="action copy"),
            class_="code",
        )
        for command in evidence.commands
    ]
    facts = _flat({key: value for key, value in evidence.comparison.items() if key not in _TYPED})
    for title, rows in (("Settings", facts), ("Environment", _flat(evidence.recorded.environment))):
        if rows:
            table = data_table(["", ""], [[name, value] for name, value in rows], left=2, label=title)
            content.append(el("details", el("summary", title), table, class_="more"))
    if not content:
        return None
    lead = None
    if evidence.commands:
        which = "The" if len(evidence.commands) == 1 else "Each"
        lead = f"{which} command continues where it stopped, and does not repeat recorded runs."
    return Section("reproduce", "Reproduce", "Reproduce", lead, content)


def _flat(content: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in content.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{before}{key}.")
        elif value is not None and value != []:
            rows.append((f"{before}{key}", _text(value)))
    return rows


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join("all" if item is None else numbers.option(item) for item in value)
    return numbers.option(value)
