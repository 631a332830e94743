"""Where the child lives: the trained share of each kind of weight in each layer, and the overlap of children."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from childtuning.compare.overlaps import Place, place_of, short_names
from childtuning.compare.records import Record
from childtuning.report import numbers
from childtuning.report.charts.figure import figure, grid
from childtuning.report.charts.heat import heat_table, span
from childtuning.report.evidence import Evidence, Setting
from childtuning.report.markup import Markup, el
from childtuning.report.method_marks import MethodMarks
from childtuning.report.section import Section

_UNFOLDED = 12  # heat maps shown without unfolding

Totals = dict[str, int]
Matrix = Sequence[Sequence[float | None]]


def section(evidence: Evidence, marks: MethodMarks) -> Section | None:
    """Return the heat maps of layer by kind of weight, and those of the artifact ``overlap``."""
    content = [*_shares(evidence), *_overlap(evidence.recorded.artifacts.get("overlap"))]
    return Section("places", "Where the child lives", "Places", None, content) if content else None


def _shares(evidence: Evidence) -> list[Markup]:
    figures, whole = [], []
    for setting in evidence.main:
        totals = _totals([record for record in evidence.records if record.group.task == setting.task])
        for method, records in _runs(setting):
            if all(trained == total for record in records for trained, total in record.parts.values()):
                whole.append(method)
            else:
                figures.append(_figure(setting, method, records, totals))
    if not figures:
        return []
    lead = "Share of the entries that were trained, in per cent, over all seeds. Blank: no entry was trained."
    names = list(dict.fromkeys(whole))
    if names:
        verb = "trains" if len(names) == 1 else "train"
        lead += f" Not shown: {numbers.listed(names)}, which {verb} whole parameters."
    content = [el("p", lead, class_="lead"), grid(figures[:_UNFOLDED])]
    if rest := figures[_UNFOLDED:]:
        content.append(el("details", el("summary", f"{len(rest)} more"), grid(rest), class_="more"))
    return content


def _totals(records: Sequence[Record]) -> Totals:
    """Return the number of entries of each parameter, in the model's order.

    The order is taken from the run that trains the most parameters.
    """
    totals: Totals = {}
    for record in sorted(records, key=lambda record: -len(record.parts)):
        for name, (_, total) in record.parts.items():
            totals.setdefault(name, total)
    return totals


def _runs(setting: Setting) -> list[tuple[str, Sequence[Record]]]:
    found = [
        (one.method, [record for record in one.choice.records if record.parts]) for one in setting.results
    ]
    return [(method, records) for method, records in found if records]


def _figure(setting: Setting, method: str, records: Sequence[Record], totals: Totals) -> Markup:
    trained, there = Counter[Place](), Counter[Place]()
    for record in records:
        for name, (count, _) in record.parts.items():
            trained[place_of(name)] += count
    for name, total in totals.items():
        there[place_of(name)] += total * len(records)
    shares = {place: trained[place] / total for place, total in there.items() if total and trained[place]}
    stacks = {place.stack for place in shares if place.region == "layer"}
    columns = sorted(
        {(place.stack, place.number) for place in there if place.stack in stacks and place.region == "layer"}
    )
    label = f"{method} on {setting.label}: share of entries that were trained"
    maps = [_layers(label, columns, shares)] if columns else []
    outside = [place for place in shares if place.region != "layer"]
    if outside:
        maps.append(_outside(label, outside, shares))
    return figure(method, maps, note=f"on {setting.label}", task=setting.task, kind="fitted")


def _layers(label: str, columns: Sequence[tuple[str, int]], shares: dict[Place, float]) -> Markup:
    found = dict.fromkeys(place.kind for place in shares if place.region == "layer")
    kinds = short_names(sorted(found, key=lambda kind: kind.endswith(" bias")))
    values = [[shares.get(Place("layer", *column, kind)) for column in columns] for kind in kinds]
    stacks = short_names(stack for stack, _ in columns)
    several = len(stacks) > 1
    names = [f"{stacks[stack]}.{number}" if several else str(number) for stack, number in columns]
    _, high = span(values)
    return heat_table(
        f"{label}, by layer and kind of weight",
        list(kinds.values()),
        names,
        values,
        _percent,
        low=0.0,
        high=high,
        corner="layer",
    )


def _outside(label: str, places: Sequence[Place], shares: dict[Place, float]) -> Markup:
    order = ("embeddings", "other", "head")
    places = sorted(places, key=lambda place: order.index(place.region))
    kinds = short_names((place.kind for place in places), fewest=2)
    values = [[shares[place]] for place in places]
    names = [kinds[place.kind] for place in places]
    return heat_table(
        f"{label}, outside the layers",
        names,
        ["share"],
        values,
        _percent,
        low=0.0,
        high=1.0,
        corner="outside the layers",
    )


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.0f}" if percent >= 10 or not percent else f"{percent:.1f}" if percent >= 0.1 else "<.1"


def _overlap(overlap: Mapping[str, Any] | None) -> list[Markup]:
    """Return the heat maps of what the children of several tasks share."""
    if not overlap:
        return []
    tasks = [str(task) for task in overlap["tasks"]]
    figures = [_pairs("The whole child", tasks, overlap["overall"])]
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
        pairs = grid([_pairs(label, tasks, matrix) for label, matrix in matrices.items()])
        folded.append(el("details", el("summary", f"{summary}, every pair"), pairs, class_="more"))
    of = f" of {overlap['method']}" if overlap.get("method") else ""
    lead = f"Entries that the children{of} of two tasks have in common, as a share of the smaller child."
    density = overlap.get("density")
    if density is not None:
        lead += f" Two random children of density {density:g} would share {numbers.share(density)}."
    title = el("h3", "Overlap of children")
    return [el("div", title, el("p", lead, class_="lead"), grid(figures), folded, id="overlap")]


def _pairs(title: str, tasks: Sequence[str], matrix: Matrix) -> Markup:
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
