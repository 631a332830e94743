"""The head of the page: what was compared, and the main findings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from childtuning.compare.statistics import Paired
from childtuning.report import numbers
from childtuning.report.evidence import Across, Evidence, Result, Setting
from childtuning.report.markup import Markup, el
from childtuning.report.method_marks import MethodMarks

_PROTOCOLS = {
    "low-resource": "with few training examples",
    "domain-transfer": "under domain shift",
    "task-transfer": "as starting points for other tasks",
    "ablation": "in an ablation",
}
_MOST_FINDINGS = 8


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
    findings = [_across(across, evidence.baseline, marks) for across in evidence.across[:1]]
    findings += [_finding(setting, evidence, marks) for setting in evidence.main[:_MOST_FINDINGS]]
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


def _finding(setting: Setting, evidence: Evidence, marks: MethodMarks) -> Markup:
    best = setting.results[0]
    found = best.row.description
    words: list[Any] = [el("b", setting.label), " "]
    if found.mean is None:
        words.append("no method has a score in every run.")
    elif all(one.row.description.num_collapsed == one.row.description.num for one in setting.results):
        words.append("every run collapsed: none is better than always predicting the most frequent answer.")
    else:
        leads = "leads with" if len(setting.results) > 1 else "has"
        words += [
            marks.named(best.method),
            f" {leads} {setting.metric} {numbers.score(found.mean)}{_interval(best)}",
        ]
        if len(setting.results) == 1:
            words.append(".")
        elif best.method == evidence.baseline:
            words += _as_baseline([other.sign for other in setting.results[1:]])
        else:
            words += _beside_baseline(best.row.paired, best.row.p_corrected, best.sign, evidence.baseline)
    return el("li", words, data_task=setting.task)


def _interval(result: Result) -> str:
    interval = result.row.description.interval
    return "" if interval is None else f" ({numbers.score(interval[0])} … {numbers.score(interval[1])})"


def _across(across: Across, baseline: str | None, marks: MethodMarks) -> Markup:
    best, *others = across.averages
    words = [
        el("b", across.label),
        " ",
        marks.named(best.method),
        f" leads with a mean of {numbers.score(best.mean)}",
    ]
    if best.method == baseline:
        words += _as_baseline([across.sign(other) for other in others])
    else:
        words += _beside_baseline(best.paired, best.p_corrected, across.sign(best), baseline)
    return el("li", words)


def _as_baseline(signs: Sequence[int]) -> list[Any]:
    """Return the comparison if the baseline is the best, from the signs of the others."""
    if all(sign < 0 for sign in signs):
        return [", the baseline; every other method is significantly worse."]
    return [", the baseline; none is significantly better."]


def _beside_baseline(
    paired: Paired | None, p_corrected: float | None, sign: int, baseline: str | None
) -> list[Any]:
    """Return the comparison of the best method with the baseline, from the comma on."""
    if paired is None:
        return ["."]
    if paired.difference is None:
        return [
            f", not compared with {baseline}: {'a run has no score' if paired.num_nan else 'no common seed'}."
        ]
    direction = "above" if paired.difference > 0 else "below"
    text = f", {numbers.score(abs(paired.difference))} {direction} {baseline}: "
    if p_corrected is None:
        return [f"{text}one common seed is not enough for a test."]
    p = numbers.p_value(p_corrected)
    p = f"p {p if p.startswith('<') else f'= {p}'}".replace(" ", "\N{NO-BREAK SPACE}")
    if sign:
        return [text, el("span", f"significant, {p}", class_="badge better"), "."]
    return [f"{text}no clear difference, {p}."]
