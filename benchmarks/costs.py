"""The table of costs, from the recorded results of ``run.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_FILES = ("step", "select", "fisher", "train", "memory", "script", "import")


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table; the first column is text, the others are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def costs(folder: Path, *, with_target: bool = False) -> str:
    """Return the ratios of every recorded benchmark, or those that have a target; nothing where none is recorded.

    Args:
        folder: holds NAME.json as ``run.py --output`` writes it; a file that is missing has no rows.
        with_target: leave out what has no target.
    """
    paths = [folder / f"{name}.json" for name in _FILES]
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
    rows = [
        _row(row)
        for record in records
        for row in record["ratios"]
        if row["at_most"] is not None or not with_target
    ]
    if not rows:
        return "Nothing is recorded yet."
    return "\n".join(
        [
            f"Side by side in alternating runs on {_machines(records)}. A ratio is one of minima over the samples, "
            "unless it says median. `python benchmarks/run.py NAME`; every sample, the settings and what could not "
            "run are in `benchmarks/results`:",
            "",
            table(["cost", "measured", "at most"], rows),
        ]
    )


def _row(row: dict[str, Any]) -> list[str]:
    value, limit = row["value"], row["at_most"]
    shown = "—" if value is None else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"
    median = " (median)" if row["statistic"] == "median" else ""
    return [row["name"] + median, shown, "" if limit is None else f"{limit:g}"]


def _machines(records: list[dict[str, Any]]) -> str:
    """Say where it was measured, once for each machine."""
    said = {}
    for record in records:
        about = record["environment"]
        machine = f"{about['cpu']} ({about['capability']})"
        said[f"{machine}, {about['threads']} threads, torch {about['packages']['torch']}"] = None
    return "; ".join(said)
