"""The overlap of the children of several tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from childtuning.compare.overlaps import short_names
from childtuning.report import numbers
from childtuning.report.charts.figure import figure, grid
from childtuning.report.charts.heat import heat_table
from childtuning.report.evidence import Evidence
from childtuning.report.markup import Markup, el
from childtuning.report.method_marks import MethodMarks
from childtuning.report.section import Section

Matrix = Sequence[Sequence[float | None]]


def section(evidence: Evidence, marks: MethodMarks) -> Section | None:
    """Return the heat maps of the artifact ``overlap``."""
    overlap: Mapping[str, Any] | None = evidence.recorded.artifacts.get("overlap")
    if not overlap:
        return None
    tasks = [str(task) for task in overlap["tasks"]]
    figures = [_figure("The whole child", tasks, overlap["overall"])]
    folded = []
    for key, summary in (("by_layer", "By layer"), ("by_kind", "By kind of weight")):
        matrices: Mapping[str, Matrix] = overlap.get(key) or {}
        if not matrices:
            continue
        names = short_names(matrices)
        matrices = {names[label]: matrix for label, matrix in matrices.items()}
        means = {label: _mean_beside_diagonal(matrix) for label, matrix in matrices.items()}
        rows = [[value] for value in means.values()]
        label = f"Mean overlap of two tasks, {summary.lower()}"
        table = heat_table(
            label, list(means), ["mean"], rows, numbers.share, low=0.0, high=1.0, corner=key[3:]
        )
        figures.append(figure(summary, table, note="mean over pairs of tasks", kind="fitted"))
        pairs = grid([_figure(label, tasks, matrix) for label, matrix in matrices.items()])
        folded.append(el("details", el("summary", f"{summary}, every pair"), pairs, class_="more"))
    lead = "Entries that the children of two tasks have in common, as a share of the smaller child."
    density = overlap.get("density")
    if density is not None:
        lead += f" Two random children of density {density:g} would share {numbers.share(density)}."
    return Section("overlap", "Overlap of children", "Overlap", lead, [grid(figures), folded])


def _figure(title: str, tasks: Sequence[str], matrix: Matrix) -> Markup:
    label = f"Overlap of children, {title}"
    table = heat_table(label, tasks, tasks, matrix, numbers.share, low=0.0, high=1.0, own=True)
    return figure(title, table, kind="fitted")


def _mean_beside_diagonal(matrix: Matrix) -> float | None:
    known = [
        value
        for i, line in enumerate(matrix)
        for j, value in enumerate(line)
        if i != j and not numbers.missing(value)
    ]
    return sum(known) / len(known) if known else None  # type: ignore[arg-type]
