"""Where the child lives: the trained share of each kind of weight in each layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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


def section(evidence: Evidence, marks: MethodMarks) -> Section | None:
    """Return the heat maps of layer by kind of weight."""
    figures, whole = [], []
    for setting in evidence.main:
        totals = _totals([record for record in evidence.records if record.group.task == setting.task])
        for method, records in _runs(setting):
            if all(trained == total for record in records for trained, total in record.parts.values()):
                whole.append(method)
            else:
                figures.append(_figure(setting, method, records, totals))
    if not figures:
        return None
    lead = "Share of the entries that were trained, in per cent, over all seeds. Blank: no entry was trained."
    names = list(dict.fromkeys(whole))
    if names:
        verb = "trains" if len(names) == 1 else "train"
        lead += f" Not shown: {numbers.listed(names)}, which {verb} whole parameters."
    content: list[Any] = [grid(figures[:_UNFOLDED])]
    if figures[_UNFOLDED:]:
        content.append(
            el(
                "details",
                el("summary", f"{len(figures) - _UNFOLDED} more"),
                grid(figures[_UNFOLDED:]),
                class_="more",
            )
        )
    return Section("places", "Where the child lives", "Places", lead, content)


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
