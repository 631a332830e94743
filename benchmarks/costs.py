"""The tables of costs, from the recorded results of ``run.py``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from floors import machine_name, measured_machine, ratio_floor, work_of

_COMMANDS = {
    "step": "step",
    "select": "select",
    "fisher": "fisher",
    "choose": "choose --repeats 3",
    "train": "train",
    "costs": "costs",
    "large": "large",
    "memory": "memory",
    "memory-small": "memory --batch-size 2",
    "script": "train --script",
    "waiting": "waiting --repeats 3",
    "import": "import",
    "compare": "compare --train-limit 200 --repeats 3",
    "report": "report",
}


def table(header: list[str], rows: list[list[str]], *, text: Sequence[int] = (0,)) -> str:
    """Return a Markdown table; columns are numbers but for those of text."""
    rule = ["---" if column in text else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def costs(folder: Path, *, short: bool = False) -> str:
    """Return the ratios of every recorded benchmark; nothing where none is recorded.

    Args:
        folder: holds NAME.json as ``run.py --output`` writes it; a file that is missing has no rows.
        short: only what has a target, without the floors.
    """
    records = _records(folder)
    machine = measured_machine(folder)
    rows = []
    for name, record in records.items():
        work = work_of(record)
        here = machine if machine and machine.name == machine_name(record) else None
        for row in record["ratios"]:
            if row["at_most"] is None and short:
                continue
            median = " (median)" if row["statistic"] == "median" else ""
            limit = "" if row["at_most"] is None else f"{row['at_most']:g}"
            floor = [] if short else [_shown(ratio_floor(row, work, here), "")]
            missed = row["at_most"] is not None and row["value"] > row["at_most"]
            value = _shown(row["value"]) + (" (missed)" if missed else "")
            rows.append([row["name"] + median, *floor, value, limit, f"`{_COMMANDS[name]}`"])
    if not rows:
        return "Nothing is recorded yet."
    header = ["cost", *([] if short else ["floor"]), "measured", "at most", "command"]
    return "\n".join(
        [
            f"Side by side in alternating runs on {_machines(list(records.values()))}. A ratio is one of minima over "
            "the samples, unless it says median. The command is `python benchmarks/run.py` and what the last column "
            "says; “missed” marks a ratio above the limit that we "
            "set ourselves; samples, settings and what could not run are in `benchmarks/results`:",
            "",
            table(header, rows, text=(0, len(header) - 1)),
        ]
    )


def floors(folder: Path) -> str:
    """Return the floor of each case that has one, and how far from it the fastest sample is."""
    machine = measured_machine(folder)
    rows = []
    for record in _records(folder).values():
        here = machine if machine and machine.name == machine_name(record) else None
        for case, work in work_of(record).items():
            measured = min(record["samples"][case]["values"])
            floor = here.seconds(work) if here else None
            rows.append(
                [
                    case,
                    f"{work.num_bytes / 1e6:,.0f}" if work.num_bytes else "",
                    f"{work.operations / 1e9:,.0f}" if work.operations else "",
                    "—" if floor is None else f"{floor * 1e3:.1f}",
                    f"{measured * 1e3:.1f}",
                    "—" if floor is None else f"{measured / floor:.2f}",
                ]
            )
    if not rows:
        return "Nothing is recorded yet."
    if machine:
        rates = (
            f"Best rates measured on this machine: {machine.bytes_per_second / 1e9:.1f}·10⁹ bytes and "
            f"{machine.operations_per_second / 1e9:.0f}·10⁹ operations a second"
        )
    else:
        rates = "The machine's rates are not recorded yet, so that the floors in time and the distances are missing"
    return "\n".join(
        [
            f"{rates} (`python benchmarks/run.py floors`). The distance is measured ÷ floor:",
            "",
            table(["case", "10⁶ bytes", "10⁹ operations", "floor, ms", "measured, ms", "distance"], rows),
        ]
    )


def _records(folder: Path) -> dict[str, dict[str, Any]]:
    paths = {name: folder / f"{name}.json" for name in _COMMANDS}
    return {
        name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.is_file()
    }


def _shown(value: float | None, missing: str = "—") -> str:
    return missing if value is None else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def _machines(records: list[dict[str, Any]]) -> str:
    """Say where it was measured, once for each machine."""
    said = {}
    for record in records:
        about = record["environment"]
        machine = f"{about['cpu']} ({about['capability']})"
        said[f"{machine}, {about['threads']} threads, torch {about['packages']['torch']}"] = None
    return "; ".join(said)
