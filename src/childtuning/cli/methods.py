"""childtuning methods"""

from __future__ import annotations

import dataclasses
from typing import Any

from childtuning.cli import options as o
from childtuning.cli.printing import print_json, print_table

NAME = "methods"


def run(as_json: o.AsJson = False) -> None:
    """List the ways to fine-tune.

    Example:

        childtuning methods --json
    """
    from childtuning.methods import all_methods

    fields = ("name", "part", "summary", "trains", "memory", "density", "source")
    listed = [{field: getattr(method, field) for field in fields} for method in all_methods()]
    for entry, method in zip(listed, all_methods(), strict=True):
        entry["options"] = {option.name: option.default for option in dataclasses.fields(method)}  # type: ignore[arg-type]
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
