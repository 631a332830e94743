"""The marks of methods: each has one colour and one shape, the same in every chart of a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from childtuning.report.markup import Markup, el

LONG = 18  # characters beyond which a name may break
NUM_COLOURS = 6  # page.css has them as --m1 … --m6, and the baseline's grey as --m0
SHAPES = {
    "circle": "M5 0A5 5 0 1 1-5 0A5 5 0 1 1 5 0Z",
    "square": "M-4.5-4.5H4.5V4.5H-4.5Z",
    "diamond": "M0-6.2L6.2 0L0 6.2L-6.2 0Z",
    "up": "M0-5.8L6 4.6H-6Z",
    "down": "M0 5.8L6-4.6H-6Z",
    "cross": "M-1.8-5.4H1.8V-1.8H5.4V1.8H1.8V5.4H-1.8V1.8H-5.4V-1.8H-1.8Z",
}


class MethodMarks:
    """Colours and shapes for methods.

    Args:
        methods: in order; with more than 36 besides the baseline, marks repeat.
        baseline: gets the neutral grey; ``None`` for none.
    """

    def __init__(self, methods: Sequence[str], baseline: str | None) -> None:
        self.methods = tuple(methods)
        names = list(SHAPES)
        self._places = {method: place for place, method in enumerate(methods)}
        self._colours, self._shapes = {}, {}
        others = [method for method in methods if method != baseline]
        for place, method in enumerate(others):
            self._colours[method] = 1 + place % NUM_COLOURS
            self._shapes[method] = names[(1 + place + place // NUM_COLOURS) % len(names)]
        if baseline is not None:
            self._colours[baseline], self._shapes[baseline] = 0, names[0]

    def place(self, method: str) -> int:
        """Return the method's number, used as ``data-m`` of its marks."""
        return self._places[method]

    def colour(self, method: str) -> str:
        """Return the class that sets ``--c``."""
        return f"m{self._colours[method]}"

    def shape(self, method: str) -> str:
        """Return the name of its symbol."""
        return f"#mark-{self._shapes[method]}"

    def swatch(self, method: str) -> Markup:
        """Return the mark shown beside a name."""
        use = el("use", href=self.shape(method), class_="mean")
        return el(
            "svg", use, class_=f"swatch {self.colour(method)}", viewBox="-8 -8 16 16", aria_hidden="true"
        )

    def group(self, method: str, *drawn: Any) -> Markup:
        """Return the group of a method's elements in a chart."""
        return el("g", drawn, class_=self.colour(method), data_m=self.place(method))

    def named(self, method: str) -> Markup:
        """Return mark and name."""
        name = "name long" if len(method) > LONG else "name"
        return el("span", self.swatch(method), el("span", method, class_=name), class_="method")

    def key(self, shown: Sequence[str]) -> Markup:
        """Return the legend of a chart; its entries highlight their method."""
        entries = [
            el(
                "li",
                el(
                    "button",
                    self.named(method),
                    type="button",
                    data_focus=self.place(method),
                    aria_pressed="false",
                ),
            )
            for method in self.methods
            if method in set(shown)
        ]
        return el("ul", entries, class_="key", aria_label="Methods")


def symbols() -> Markup:
    """Return the definitions of the shapes, needed once per page."""
    paths = [el("path", id=f"mark-{name}", d=d) for name, d in SHAPES.items()]
    return el("svg", el("defs", paths), width=0, height=0, class_="symbols", aria_hidden="true")
