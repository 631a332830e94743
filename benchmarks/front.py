"""What methods gain on something new against what they forget: a table, and a chart of the same numbers.

`DECODER` is what ``forgetting.py`` recorded, `ENCODER` what ``similarity.py`` did.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import mean, stdev

from costs import table

_COLOURS = {
    "full": "#888888",
    "l2-sp": "#b8860b",
    "r3f": "#e377c2",
    "child-f": "#ff7f0e",
    "child-d element": "#1f77b4",
    "child-d column": "#2ca02c",
    "child-random": "#9467bd",
    "lora": "#d62728",
}
_OF_RUN = ("method", "lr", "seed")  # what the runs of one table differ in
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _LEGEND = 640, 380, 52, 44, 150
Result = Mapping[str, float]


@dataclass(frozen=True)
class Measure:
    """What a file of recorded runs measures.

    Attributes:
        name: of the file, without its ending.
        gained, lost: by the results before and after tuning.
        unit: of both.
        on_new, on_old: what is gained, and what is lost.
        digits: decimals shown.
    """

    name: str
    gained: Callable[[Result, Result], float]
    lost: Callable[[Result, Result], float]
    unit: str
    on_new: str
    on_old: str
    digits: int


DECODER = Measure(
    "forgetting",
    gained=lambda before, after: before["text"] - after["text"],
    lost=lambda before, after: after["stories"] - before["stories"],
    unit="in nats a token",
    on_new="gained on the new text (nats a token)",
    on_old="lost on the model's own stories (nats a token)",
    digits=2,
)
ENCODER = Measure(
    "similarity",
    gained=lambda before, after: after["score"] - after["constant"],
    lost=lambda before, after: before["similarity"] - after["similarity"],
    unit="as correlations (Matthews / Spearman)",
    on_new="gained on CoLA (Matthews)",
    on_old="lost of sentence similarity (Spearman)",
    digits=3,
)


@dataclass(frozen=True)
class Point:
    """A method at a rate: means over the seeds, in the measure's unit."""

    method: str
    rate: float
    num_seeds: int
    trained: int
    gained: float
    lost: float
    spread: tuple[float, float]

    def is_beaten(self, others: list[Point]) -> bool:
        """Whether another point gains more and loses less."""
        return any(other.gained > self.gained and other.lost < self.lost for other in others)


def points(folder: Path, measure: Measure) -> list[Point]:
    """Return every method at every rate, in the order in which they ran."""
    path = folder / f"{measure.name}.json"
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []
    settings = {tuple((n, v) for n, v in run["key"].items() if n not in _OF_RUN) for run in runs}
    assert len(settings) < 2, f"{path.name} has runs of several settings: {settings}"
    before = next((run["result"] for run in runs if run["key"]["method"] == "none"), None)
    found = defaultdict(list)
    for run in runs:
        if run["key"]["method"] != "none":
            found[run["key"]["method"], run["key"]["lr"]].append(run["result"])
    made = []
    for (method, rate), results in found.items():
        assert before is not None
        gained = [measure.gained(before, result) for result in results]
        lost = [measure.lost(before, result) for result in results]
        spread = (stdev(gained), stdev(lost)) if len(results) > 1 else (0.0, 0.0)
        trained = results[0]["trained_parameters"]
        made.append(Point(method, rate, len(results), trained, mean(gained), mean(lost), spread))
    return made


def front(folder: Path, measure: Measure) -> str:
    """Return a table: what each method gains and loses at each rate; the front is bold."""
    all_points = points(folder, measure)
    if not all_points:
        return "Nothing is recorded yet."
    rates = sorted({point.rate for point in all_points})
    most = max(point.num_seeds for point in all_points)
    rows = []
    for method in dict.fromkeys(point.method for point in all_points):
        mine = {point.rate: point for point in all_points if point.method == method}
        cells = [
            _cell(mine[rate], all_points, measure.digits, most) if rate in mine else "—" for rate in rates
        ]
        rows.append([f"`{method}`", f"{next(iter(mine.values())).trained:,}", *cells])
    fewer = ", or of as many as stand in brackets" if any(p.num_seeds < most for p in all_points) else ""
    head = f"Gained / lost, {measure.unit}; means of {most} seeds{fewer}; on the front in bold:"
    return head + "\n\n" + table(["method", "trained", *(f"lr {rate:g}" for rate in rates)], rows)


def _cell(point: Point, others: list[Point], digits: int, most: int) -> str:
    text = f"{point.gained:.{digits}f} / {point.lost:.{digits}f}"
    seeds = "" if point.num_seeds == most else f" ({point.num_seeds})"
    return (text if point.is_beaten(others) else f"**{text}**") + seeds


def chart(folder: Path, measure: Measure) -> str:
    """Return the inside of an SVG: a line of rates for each method."""
    all_points = points(folder, measure)
    if not all_points:
        return ""
    most_lost, most_gained = max(p.lost for p in all_points), max(p.gained for p in all_points)

    def at(point: Point) -> tuple[float, float]:
        x = _LEFT + (_WIDTH - _LEFT - _LEGEND) * point.lost / most_lost
        return x, 12 + (_HEIGHT - _BOTTOM - 12) * (1 - point.gained / most_gained)

    drawn = [
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        f'<path d="M{_LEFT} 12V{_HEIGHT - _BOTTOM}H{_WIDTH - _LEGEND}" fill="none" stroke="#999"/>',
        _text(_LEFT, _HEIGHT - 10, f"{measure.on_old} →"),
        f'<g transform="translate(14 {_HEIGHT - _BOTTOM}) rotate(-90)">'
        + _text(0, 0, f"{measure.on_new} →")
        + "</g>",
    ]
    for share in (0.0, 0.5, 1.0):
        x = _LEFT + (_WIDTH - _LEFT - _LEGEND) * share
        y = 12 + (_HEIGHT - _BOTTOM - 12) * (1 - share)
        drawn += [_text(x - 8, _HEIGHT - _BOTTOM + 14, f"{most_lost * share:.{measure.digits - 1}f}")]
        drawn += [_text(_LEFT - 26, y + 4, f"{most_gained * share:.{measure.digits - 1}f}")]
    for method in dict.fromkeys(point.method for point in all_points):
        mine = sorted((p for p in all_points if p.method == method), key=lambda p: p.rate)
        colour = _COLOURS[_kind(method)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in map(at, mine))
        drawn.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-opacity=".5"/>')
        for point in mine:
            x, y = at(point)
            fill = "none" if point.is_beaten(all_points) else colour
            tip = f"{method}, lr {point.rate:g}: gained {point.gained:.{measure.digits}f}, "
            tip += f"lost {point.lost:.{measure.digits}f}"
            drawn.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{colour}">'
                f"<title>{escape(tip)}</title></circle>"
            )
    shown = [kind for kind in _COLOURS if any(_kind(point.method) == kind for point in all_points)]
    for index, kind in enumerate(shown):
        y = 24 + 20 * index
        drawn.append(f'<circle cx="{_WIDTH - _LEGEND + 20}" cy="{y - 4}" r="4" fill="{_COLOURS[kind]}"/>')
        drawn.append(_text(_WIDTH - _LEGEND + 32, y, kind))
    drawn.append(_text(_WIDTH - _LEGEND + 14, 24 + 20 * len(shown), "filled: on the front"))
    return "\n".join(drawn)


def _kind(method: str) -> str:
    return next(
        kind for kind in _COLOURS if all(word in method for word in kind.split()) and method[:3] == kind[:3]
    )


def _text(x: float, y: float, words: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" font-family="sans-serif" font-size="12" fill="#333">{escape(words)}</text>'
