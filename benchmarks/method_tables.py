"""Tables of every method on one task, and of the child's granularities, from the recorded results."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from costs import table

_HEADER = ["method", "accuracy", "trained", "optimizer", "saved", "time", "resumed bitwise"]
_NAMES = {"cola": "CoLA (Matthews)", "rte": "RTE (accuracy)", "sst2": "SST-2 (accuracy)"}


def methods(folder: Path) -> str:
    """Every method and ten combinations on 500 examples of RTE, one epoch, one seed; and what is refused."""
    path = folder / "methods.json"
    if not path.is_file():
        return ""
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    alone = [run for run in runs if "resumed_bitwise" in run["result"]]
    joined = [run for run in runs if "method" in run["key"] and "resumed_bitwise" not in run["result"]]
    refused = [run for run in runs if "refused" in run["key"]]
    parts = [
        table(_HEADER, [_row(run) for run in alone]),
        "",
        table(_HEADER[:-1], [_row(run)[:-1] for run in joined]),
        "",
        *(
            f"- `{run['key']['refused']}`: {run['result']['said'].partition('together: ')[2]}"
            for run in refused
        ),
    ]
    return "\n".join(parts)


def _row(run: dict[str, Any]) -> list[str]:
    result = run["result"]
    return [
        f"`{run['key']['method']}`",
        f"{result['score']:.3f}",
        f"{result['trained_parameters']:,}",
        f"{result['state_bytes'] / 1e6:.1f} MB",
        f"{result['saved_bytes'] / 1e6:.1f} MB",
        f"{result['fisher_seconds'] + result['train_seconds']:.0f} s",
        "yes" if result.get("resumed_bitwise") else "no",
    ]


def quality(folder: Path) -> str:
    """Element and row children at two densities, and precisions: every seed."""
    exports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("quality-*.json"))]
    if not exports:
        return ""
    rows = []
    for export in exports:
        records = [record for record in export["records"] if record["state"] == "done"]
        for point in _distinct(record["point"] for record in records):
            mine = [record for record in records if record["point"] == point]
            values = [record["result"]["metric"]["value"] for record in mine]
            if values:
                spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
                group, config = mine[0]["group"], mine[0]["config"]
                rows.append(
                    [
                        _NAMES.get(group["task"], group["task"]),
                        f"{group['train_size']:,}",
                        config["granularity"],
                        f"{config['density']:g}",
                        config["precision"],
                        f"{mean(values):.3f}{spread}",
                        ", ".join(f"{value:.3f}" for value in values),
                    ]
                )
    commands = [export["comparison"]["command"] for export in exports]
    header = ["task", "examples", "granularity", "density", "precision", "mean", "seeds"]
    return "\n".join([table(header, rows, text=(0, 2, 4)), "", "```bash", *commands, "```"])


def _distinct(points: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for point in points:
        if point not in found:
            found.append(point)
    return found
