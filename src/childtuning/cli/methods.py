"""childtuning methods"""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from childtuning.cli import options as o
from childtuning.cli.printing import print_json, print_table

NAME = "methods"
LISTED = Path(__file__).with_name("methods.json")  # what the registry says, so that a list needs no torch


def run(as_json: o.AsJson = False) -> None:
    """List the ways to fine-tune.

    Example:

        childtuning methods --json
    """
    listed = json.loads(LISTED.read_text(encoding="utf-8"))
    if entry_points(
        group="childtuning.methods"
    ):  # other packages declare some, which only their code describes
        from childtuning.methods import described

        listed = described()
    if as_json:
        print_json({"methods": listed})
        return
    rows = [
        [_spelled(entry), entry["summary"], entry["trains"], entry["memory"], entry["source"]]
        for entry in listed
    ]
    print_table(None, ("method", "what it does", "trains", "memory", "source"), rows, left=5)
    print(
        "Options stand behind a colon, the first of them by its value alone; + joins methods: child-d+r3f:weight=0.7"
    )


def _spelled(entry: dict[str, Any]) -> str:
    options = ",".join(f"{name}={value}" for name, value in entry["options"].items())
    return f"{entry['name']}:{options}" if options else entry["name"]
