"""The parts of the page, in order."""

from __future__ import annotations

from childtuning.report.section import MakeSection
from childtuning.report.sections import (
    costs,
    curves,
    examples,
    places,
    ranking,
    reproduce,
    runs,
    sizes,
    transfer,
    tuning,
)

SECTIONS: tuple[MakeSection, ...] = (
    ranking.section,
    costs.section,
    sizes.section,
    transfer.section,
    examples.section,
    curves.section,
    places.section,
    tuning.section,
    runs.section,
    reproduce.section,
)
