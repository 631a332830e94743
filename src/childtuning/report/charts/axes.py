"""Axes, and the elements drawn between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from childtuning.report.markup import Markup, el
from childtuning.report.scales import Scale

HEIGHT = 220  # pixels
_CURVE_WIDTH = 1000  # curves are drawn to this width and stretched
_DIGIT = 6.6  # pixels per character of a tick label


@dataclass(frozen=True)
class Axes:
    """A pair of scales with room for marks: ``HEIGHT`` pixels high, as wide as the page allows.

    Attributes:
        x, y: the scales.
        height: in pixels.
    """

    x: Scale
    y: Scale
    height: int = HEIGHT

    def top(self, value: float) -> str:
        """Return the position of a number on the y axis, in pixels."""
        return f"{self.height * (1 - self.y.share(value)):.5g}"

    def point(
        self, x: float, y: float, class_: str = "seed", tip: str | None = None, radius: float = 3
    ) -> Markup:
        """Return a dot."""
        return el("circle", class_=class_, cx=self.x.percent(x), cy=self.top(y), r=radius, data_tip=tip)

    def symbol(self, shape: str, x: float, y: float, tip: str | None = None) -> Markup:
        """Return a method's mark, for a mean."""
        return el("use", class_="mean", href=shape, x=self.x.percent(x), y=self.top(y), data_tip=tip)

    def upright(self, x: float, low: float, high: float, class_: str = "interval") -> Markup:
        """Return a vertical line from one number on the y axis to another."""
        at = self.x.percent(x)
        return el("line", class_=class_, x1=at, x2=at, y1=self.top(low), y2=self.top(high))

    def curves(self, lines: Iterable[tuple[str, Sequence[tuple[float, float]]]]) -> Markup:
        """Return curves, each given by its class and its points."""
        paths = [el("path", class_=class_, d=self._path(points)) for class_, points in lines]
        return el(
            "svg",
            paths,
            class_="stretched",
            aria_hidden="true",
            viewBox=f"0 0 {_CURVE_WIDTH} {self.height}",
            preserveAspectRatio="none",
            width="100%",
            height=self.height,
        )

    def drawing(self, marks: Any, label: str) -> Markup:
        """Return the chart.

        Args:
            marks: what is drawn between the axes.
            label: the chart in words, for screen readers.
        """
        left = 14 + _DIGIT * max((len(self.y.format_fn(tick)) for tick in self.y.ticks), default=0)
        svg = el("svg", self._grid(), marks, role="img", aria_label=label, width="100%", height=self.height)
        return el(
            "div",
            el("div", self.y.title, class_="y-title", aria_hidden="true"),
            svg,
            el("div", self.x.title, class_="x-title", aria_hidden="true"),
            class_="plot",
            style=f"--left:{left:.0f}px",
        )

    def _path(self, points: Sequence[tuple[float, float]]) -> str:
        places = (
            f"{_CURVE_WIDTH * self.x.share(x):.0f} {self.height * (1 - self.y.share(y)):.1f}"
            for x, y in points
        )
        return "M" + "L".join(places)

    def _grid(self) -> Markup:
        lines, texts = [], []
        for tick in self.y.ticks:
            y = self.top(tick)
            lines.append(el("line", x2="100%", y1=y, y2=y))
            texts.append(el("text", self.y.format_fn(tick), x=-8, y=y, dy=".32em", class_="y"))
        for tick in self.x.ticks:
            x = self.x.percent(tick)
            lines.append(el("line", x1=x, x2=x, y1=self.height, y2=self.height + 4))
            texts.append(el("text", self.x.format_fn(tick), x=x, y=self.height + 18, class_="x"))
        lines.append(el("line", x2="100%", y1=self.height, y2=self.height, class_="axis"))
        return el("g", lines, texts, class_="grid", aria_hidden="true")
