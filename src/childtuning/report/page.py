"""A self-contained HTML page that can be opened from disk without a network, and printed."""

from __future__ import annotations

from importlib.resources import files

from childtuning.compare.records import Recorded
from childtuning.report.evidence import Evidence
from childtuning.report.markup import Markup, el, raw_text
from childtuning.report.method_marks import MethodMarks, symbols
from childtuning.report.sections import SECTIONS
from childtuning.report.sections.headline import headline, title

# The page loads nothing and sends nothing, whatever a name or an error message contains.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def html_page(recorded: Recorded) -> str:
    """Return a report as one HTML file.

    Args:
        recorded: the contents of a store; parts with nothing to show are left out.
    """
    evidence = Evidence(recorded)
    marks = MethodMarks(evidence.methods, evidence.baseline)
    sections = [section for make in SECTIONS if (section := make(evidence, marks)) is not None]
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("link", rel="icon", href="data:,"),
        el("title", title(evidence)),
        el("style", _asset("page.css")),
    )
    links = [el("li", el("a", section.short, href=f"#{section.id}")) for section in sections]
    bar = el("nav", el("ul", links), _task_choice(evidence), aria_label="Contents") if sections else None
    body = el(
        "body",
        symbols(),
        el("main", headline(evidence, marks), bar, [section.html() for section in sections]),
        el("div", id="tip", role="tooltip", hidden=True),
        el("script", _asset("page.js")),
    )
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


def _task_choice(evidence: Evidence) -> Markup | None:
    if len(evidence.tasks) < 2:
        return None
    options = [
        el("option", "all tasks", value=""),
        [el("option", task, value=task) for task in evidence.tasks],
    ]
    return el("label", el("span", "Task "), el("select", options, id="task"))


def _asset(name: str) -> Markup:
    return raw_text((files("childtuning.report") / "assets" / name).read_text(encoding="utf-8"))
