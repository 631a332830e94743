"""The record of a benchmark: samples, ratios, and what could not run, as one JSON object and as a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

T = TypeVar("T")

_STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {"min": min, "median": median}


class Record:
    """Collects what one benchmark measures.

    Args:
        benchmark: its name.
        options: those it ran with.
    """

    def __init__(self, benchmark: str, options: dict[str, Any]) -> None:
        self.benchmark, self.options = benchmark, options
        self.samples: dict[str, dict[str, Any]] = {}
        self.ratios: list[dict[str, Any]] = []
        self.skipped: list[dict[str, str]] = []
        self.failed: list[dict[str, str]] = []
        self.facts: dict[str, Any] = {}
        self.environment: dict[str, Any] = {}

    def attempt(self, name: str, build: Callable[[], T], *, ours: bool = False) -> T | None:
        """Return what ``build`` returns, or None and a record of why it cannot run; a name that failed stays failed."""
        if any(row["name"] == name for row in (*self.skipped, *self.failed)):
            return None
        try:
            return build()
        except Exception as fault:  # any: one reference that cannot run must not lose the others' samples
            lines = str(fault).strip().splitlines()
            reason = f"{type(fault).__name__}: {lines[0] if lines else ''}"[:300]
            (self.failed if ours else self.skipped).append({"name": name, "skipped": reason})
            return None

    def add_samples(self, name: str, values: Sequence[float], unit: str) -> None:
        """Keep every sample of a case."""
        self.samples.setdefault(name, {"unit": unit, "values": []})["values"].extend(values)

    def ratio(
        self, name: str, over: str, under: str, *, at_most: float | None = None, statistic: str = "min"
    ) -> None:
        """Divide one case's statistic by another's; a case without samples leaves the value empty."""
        missing = [case for case in (over, under) if not self._values(case)]
        row: dict[str, Any] = {"name": name, "value": None, "at_most": at_most, "statistic": statistic}
        row |= {"over": over, "under": under}
        if missing:
            row["missing"] = missing
        else:
            each = {key: fn(self._values(over)) / fn(self._values(under)) for key, fn in _STATISTICS.items()}
            row |= {"value": each[statistic], "by_statistic": each}
            row["samples"] = min(len(self._values(over)), len(self._values(under)))
        self._add(row)

    def value(
        self, name: str, value: float | None, *, at_most: float | None = None, statistic: str = "exact"
    ) -> None:
        """Record a number that is no ratio of two cases' samples."""
        self._add({"name": name, "value": value, "at_most": at_most, "statistic": statistic})

    def fastest(self, cases: Sequence[str]) -> str:
        """Return the case of the smallest minimum among those with samples; the first where there are none."""
        measured = [case for case in cases if self._values(case)]
        return min(measured, key=lambda case: min(self._values(case))) if measured else cases[0]

    def _values(self, case: str) -> list[float]:
        return self.samples.get(case, {}).get("values", [])

    def _add(self, row: dict[str, Any]) -> None:
        limit, value = row["at_most"], row["value"]
        judged = limit is not None and value is not None and not self.options.get("quick")
        row["holds"] = value <= limit if judged else None
        self.ratios.append(row)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object."""
        return {
            "benchmark": self.benchmark,
            "options": self.options,
            "ratios": self.ratios,
            "facts": self.facts,
            "skipped": self.skipped,
            "failed": self.failed,
            "samples": self.samples,
            "environment": self.environment,
        }

    def write(self, path: Path) -> None:
        """Write the JSON object to a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def table(self) -> str:
        """Return everything for a reader on a terminal."""
        lines = [f"{self.benchmark}: cases", ""]
        for name, case in self.samples.items():
            low, middle = (_shown(fn(case["values"]), case["unit"]) for fn in (min, median))
            lines.append(f"  {name:<58} min {low:>11}  median {middle:>11}  of {len(case['values'])}")
        lines += ["", f"{self.benchmark}: ratios", ""]
        for row in self.ratios:
            value = "—" if row["value"] is None else f"{row['value']:.3f}"
            limit = "" if row["at_most"] is None else f"at most {row['at_most']:g}"
            verdict = {True: "holds", False: "MISSED", None: ""}[row["holds"]]
            lines.append(f"  {row['name']:<78} {value:>8}  {limit:<13} {verdict}")
        for title, rows in (("skipped", self.skipped), ("FAILED", self.failed)):
            if rows:
                lines += ["", f"{self.benchmark}: {title}", ""]
                lines += [f"  {row['name']}: {row['skipped']}" for row in rows]
        return "\n".join(lines)


def _shown(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 1e6:.1f} MB"
    return f"{value * 1e3:.1f} ms" if value < 10 else f"{value:.1f} s"
