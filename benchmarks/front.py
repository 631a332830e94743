"""Gain against forgetting, from the recorded runs of ``forgetting.py``: a table, and a chart of the same numbers."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import mean, stdev

from costs import table

_COLOURS = {
    "full": "#888888",
    "l2-sp": "#b8860b",
    "child-d element": "#1f77b4",
    "child-d column": "#2ca02c",
    "child-random": "#9467bd",
    "lora": "#d62728",
}
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _LEGEND = 640, 380, 52, 44, 150


@dataclass(frozen=True)
class Point:
    """A method at a rate: mean over the seeds, in nats a token.

    Attributes:
        gained, lost: on the new text, and on the model's own stories.
        spread: the standard deviations of both.
    """

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


def points(folder: Path) -> list[Point]:
    """Return every method at every rate, in the order in which they ran."""
    path = folder / "forgetting.json"
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []
    before = next((run["result"] for run in runs if run["key"]["method"] == "none"), None)
    found = defaultdict(list)
    for run in runs:
        if run["key"]["method"] != "none":
            found[run["key"]["method"], run["key"]["lr"]].append(run["result"])
    made = []
    for (method, rate), results in found.items():
        assert before is not None
        gained = [before["text"] - result["text"] for result in results]
        lost = [result["stories"] - before["stories"] for result in results]
        spread = (stdev(gained), stdev(lost)) if len(results) > 1 else (0.0, 0.0)
        trained = results[0]["trained_parameters"]
        made.append(Point(method, rate, len(results), trained, mean(gained), mean(lost), spread))
    return made


def front(folder: Path) -> str:
    """Return a table: what each method gains and loses at each rate; the front is bold."""
    all_points = points(folder)
    if not all_points:
        return "Nothing is recorded yet."
    rates = sorted({point.rate for point in all_points})
    rows = []
    for method in dict.fromkeys(point.method for point in all_points):
        mine = {point.rate: point for point in all_points if point.method == method}
        cells = [_cell(mine[rate], all_points) if rate in mine else "—" for rate in rates]
        rows.append([f"`{method}`", f"{next(iter(mine.values())).trained:,}", *cells])
    seeds = sorted({point.num_seeds for point in all_points})
    said = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    head = f"Gained / lost, in nats a token; means of {said} seeds; on the front in bold:"
    return head + "\n\n" + table(["method", "trained", *(f"lr {rate:g}" for rate in rates)], rows)


def _cell(point: Point, others: list[Point]) -> str:
    text = f"{point.gained:.2f} / {point.lost:.2f}"
    return text if point.is_beaten(others) else f"**{text}**"


def chart(folder: Path) -> str:
    """Return the inside of an SVG: a line of rates for each method."""
    all_points = points(folder)
    if not all_points:
        return ""
    most_lost, most_gained = max(p.lost for p in all_points), max(p.gained for p in all_points)

    def at(point: Point) -> tuple[float, float]:
        x = _LEFT + (_WIDTH - _LEFT - _LEGEND) * point.lost / most_lost
        return x, 12 + (_HEIGHT - _BOTTOM - 12) * (1 - point.gained / most_gained)

    drawn = [
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        f'<path d="M{_LEFT} 12V{_HEIGHT - _BOTTOM}H{_WIDTH - _LEGEND}" fill="none" stroke="#999"/>',
        _text(_LEFT, _HEIGHT - 10, "lost on the model's own stories (nats a token) →"),
        f'<g transform="translate(14 {_HEIGHT - _BOTTOM}) rotate(-90)">'
        + _text(0, 0, "gained on the new text (nats a token) →")
        + "</g>",
    ]
    for share in (0.0, 0.5, 1.0):
        x = _LEFT + (_WIDTH - _LEFT - _LEGEND) * share
        y = 12 + (_HEIGHT - _BOTTOM - 12) * (1 - share)
        drawn += [_text(x - 8, _HEIGHT - _BOTTOM + 14, f"{most_lost * share:.1f}")]
        drawn += [_text(_LEFT - 26, y + 4, f"{most_gained * share:.1f}")]
    for method in dict.fromkeys(point.method for point in all_points):
        mine = sorted((p for p in all_points if p.method == method), key=lambda p: p.rate)
        colour = _COLOURS[_kind(method)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in map(at, mine))
        drawn.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-opacity=".5"/>')
        for point in mine:
            x, y = at(point)
            fill = "none" if point.is_beaten(all_points) else colour
            tip = f"{method}, lr {point.rate:g}: gained {point.gained:.2f}, lost {point.lost:.2f}"
            drawn.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{colour}">'
                f"<title>{escape(tip)}</title></circle>"
            )
    for index, (kind, colour) in enumerate(_COLOURS.items()):
        y = 24 + 20 * index
        drawn.append(f'<circle cx="{_WIDTH - _LEGEND + 20}" cy="{y - 4}" r="4" fill="{colour}"/>')
        drawn.append(_text(_WIDTH - _LEGEND + 32, y, kind))
    drawn.append(_text(_WIDTH - _LEGEND + 14, 24 + 20 * len(_COLOURS), "filled: on the front"))
    return "\n".join(drawn)


def _kind(method: str) -> str:
    return next(
        kind for kind in _COLOURS if all(word in method for word in kind.split()) and method[:3] == kind[:3]
    )


def _text(x: float, y: float, words: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" font-family="sans-serif" font-size="12" fill="#333">{escape(words)}</text>'
