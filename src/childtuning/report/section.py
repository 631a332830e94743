"""`Section`: one part of the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from childtuning.report.evidence import Evidence
from childtuning.report.markup import Markup, el
from childtuning.report.method_marks import MethodMarks


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Attributes:
        id: what links point to.
        title: its heading.
        short: its name in the navigation.
        lead: what it shows, in a sentence or two.
        content: figures and tables.
    """

    id: str
    title: str
    short: str
    lead: Any
    content: Any

    def html(self) -> Markup:
        """Return the section's element."""
        heading = el("h2", el("a", self.title, href=f"#{self.id}"))
        lead = el("p", self.lead, class_="lead") if self.lead else None
        return el("section", heading, lead, self.content, id=self.id, aria_label=self.title)


# Each file of sections/ has one of these; it returns ``None`` if there is nothing to show.
MakeSection = Callable[[Evidence, MethodMarks], Section | None]
