"""childtuning methods"""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from typing import Any

from childtuning.cli import options as o
from childtuning.cli.printing import print_json, print_table

NAME = "methods"


def run(as_json: o.AsJson = False) -> None:
    """List the fine-tuning methods.

    Example:

        childtuning methods --json
    """
    listed = json.loads(o.LISTED.read_text(encoding="utf-8"))
    if entry_points(group=o.GROUP):  # methods of other packages are described only in their code
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
        "Options follow a colon; the first needs only its value. + combines methods: child-d+r3f:weight=0.7"
    )


def _spelled(entry: dict[str, Any]) -> str:
    options = ",".join(f"{name}={value}" for name, value in entry["options"].items())
    return f"{entry['name']}:{options}" if options else entry["name"]
