"""Output: one JSON object or a table on standard output, everything else on standard error."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from childtuning.runs.config import json_ready

_MOST_CLASSES = 20  # rows of a table of classes


def tell(line: str) -> None:
    """Print a message on standard error, apart from the result; of several processes, rank 0 speaks."""
    if is_first():
        print(line, file=sys.stderr, flush=True)


def is_first() -> bool:
    """Return whether torchrun, if it started this process, calls it rank 0."""
    return os.environ.get("RANK", "0") == "0"


def is_terminal() -> bool:
    """Return whether standard error is a terminal, and this process's."""
    return is_first() and sys.stderr.isatty()


def print_json(content: Mapping[str, Any]) -> None:
    """Print exactly one JSON object; non-finite numbers become null."""
    print(json_text(content))


def json_text(content: Mapping[str, Any]) -> str:
    """Return one JSON object on one line; non-finite numbers become null."""
    return json.dumps(json_ready(content), ensure_ascii=False)


def print_table(
    title: str | None, columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1
) -> None:
    """Print a table; the first ``left`` columns are left-aligned, the others right-aligned."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table(title=title, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        assert len(row) == len(columns), f"{len(row)} cells below {len(columns)} columns"
        table.add_row(*row)
    console.print(table)


def print_facts(facts: Mapping[str, str]) -> None:
    """Print named facts, one per line, aligned."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


def print_classes(
    per_class: Mapping[str, Mapping[str, float]], confusion: Sequence[Sequence[int]] | None
) -> None:
    """Print precision, recall and F1 of each class; of many, those with the lowest F1."""
    names = list(per_class)
    shown = names
    if len(names) > _MOST_CLASSES:
        shown = sorted(names, key=lambda name: per_class[name]["f1"])[:_MOST_CLASSES]
    title = None if shown is names else f"the {len(shown)} of {len(names)} classes with the lowest f1"
    rows = []
    for name in shown:
        found = per_class[name]
        mistaken = "" if confusion is None else _mistaken(names, names.index(name), confusion)
        values = [score_text(found[key]) for key in ("precision", "recall", "f1")]
        rows.append([name, *values, str(found["support"]), mistaken])
    print_table(title, ["class", "precision", "recall", "f1", "examples", "most often taken for"], rows)


def _mistaken(names: Sequence[str], index: int, confusion: Sequence[Sequence[int]]) -> str:
    wrong = [0 if other == index else count for other, count in enumerate(confusion[index])]
    return f"{names[wrong.index(max(wrong))]} ({max(wrong)})" if any(wrong) else ""


def interval_text(interval: Sequence[float] | None) -> str:
    """Return an interval in words; nothing if there is none."""
    return (
        "" if interval is None else f"  (95% interval {score_text(interval[0])} to {score_text(interval[1])})"
    )


def short_name(option: str) -> str:
    """Return a hyperparameter's shortest name on the command line."""
    return "lr" if option == "learning_rate" else option


def point_text(point: Mapping[str, Any]) -> str:
    """Return hyperparameters as short text."""
    return ", ".join(
        f"{short_name(name)} {f'{value:g}' if isinstance(value, float) else value}"
        for name, value in point.items()
    )


def score_text(value: float | None) -> str:
    """Return a score with four digits; a dash if there is none."""
    return "—" if value is None or value != value else f"{round(value, 4) + 0.0:.4f}"  # + 0.0: no minus zero


def human_bytes(count: float) -> str:
    """Return a byte count in human-readable form."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
