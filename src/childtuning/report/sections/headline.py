"""The head of the page: what was compared, and the main findings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from childtuning.report import numbers
from childtuning.report.evidence import Evidence
from childtuning.report.findings import Finding, finding
from childtuning.report.markup import Markup, el
from childtuning.report.method_marks import MethodMarks

_PROTOCOLS = {
    "low-resource": "with few training examples",
    "domain-transfer": "under domain shift",
    "task-transfer": "as starting points for other tasks",
    "ablation": "in an ablation",
}
_MOST_FINDINGS = 8
_MOST_NAMES = 4


def title(evidence: Evidence) -> str:
    """Return the page's title."""
    if not evidence.records:
        return "An empty comparison"
    names = evidence.methods
    methods = names[0] if len(names) == 1 else numbers.counted(len(names), "method")
    words = [
        f"{methods} on {numbers.listed(evidence.tasks)}",
        _PROTOCOLS.get(evidence.comparison.get("protocol") or ""),
    ]
    return " ".join(filter(None, words))


def headline(evidence: Evidence, marks: MethodMarks) -> Markup:
    """Return the head of the page."""
    findings = [
        _finding(across.label, finding(across.averages, across.standing, evidence.baseline), marks)
        for across in evidence.across[:1]
    ]
    findings += [
        _finding(
            setting.label,
            finding([one.row for one in setting.results], setting.standing, evidence.baseline),
            marks,
            setting.task,
        )
        for setting in evidence.main[:_MOST_FINDINGS]
    ]
    rest = len(evidence.main[_MOST_FINDINGS:])
    return el(
        "header",
        el("p", "childtuning report", class_="kicker"),
        el("h1", title(evidence)),
        el("p", _lead(evidence), class_="lead"),
        el(
            "dl",
            [
                el("div", el("dt", name), el("dd", value), class_=class_)
                for name, value, class_ in _facts(evidence)
            ],
        ),
        el(
            "ul",
            findings,
            el("li", f"{numbers.counted(rest, 'more task')} below.") if rest else None,
            class_="findings",
        )
        if findings
        else None,
    )


def _lead(evidence: Evidence) -> str:
    if not evidence.records:
        return "The store has no runs yet."
    if not evidence.count["done"]:
        return "No run has finished, so there is nothing to compare yet."
    asked = evidence.comparison
    others = [method for method in evidence.methods if method != evidence.baseline]
    against = f" against {evidence.baseline}" if others and evidence.baseline in evidence.methods else ""
    words = [f"{numbers.listed(others or evidence.methods, 8)}{against}"]
    if asked.get("num_seeds"):
        words.append(f"with {numbers.counted(asked['num_seeds'], 'seed')} each")
    if asked.get("model") or (asked.get("options") or {}).get("model"):
        words.append(f"from {asked.get('model') or asked['options']['model']}")
    return ", ".join(words) + "."


def _facts(evidence: Evidence) -> list[tuple[str, str, str | None]]:
    count, total = evidence.count, len(evidence.records)
    seconds = sum(record.seconds for record in evidence.records if record.seconds is not None)
    facts: list[tuple[str, str, str | None]] = [
        ("runs", f"{count['done']:,} of {total:,}" if count["done"] != total else f"{total:,}", None)
    ]
    facts.append(("failed", f"{count['failed']:,}", "bad" if count["failed"] else None))
    facts.append(("collapsed", f"{count['collapsed']:,}", "bad" if count["collapsed"] else None))
    waiting = count["planned"] + count["running"]
    if waiting:
        facts.append(("to do", f"{waiting:,}", None))
    if seconds and math.isfinite(seconds):
        facts.append(("total run time", numbers.duration(seconds), None))
    return facts


def _finding(label: str, found: Finding, marks: MethodMarks, task: str | None = None) -> Markup:
    verdict = el("span", found.verdict, class_="badge better") if found.is_clear else found.verdict
    return el(
        "li", el("b", label), " ", _named(found.methods, marks), found.claim, verdict, ".", data_task=task
    )


def _named(methods: Sequence[str], marks: MethodMarks) -> list[Any]:
    """The names with their marks, as ``numbers.listed`` joins names."""
    if len(methods) > _MOST_NAMES:
        return [numbers.listed(methods, _MOST_NAMES), " "]
    words: list[Any] = []
    for place, method in enumerate(methods):
        words += [
            marks.named(method),
            " " if place == len(methods) - 1 else " and " if place == len(methods) - 2 else ", ",
        ]
    return words
