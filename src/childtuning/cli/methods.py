"""childtuning methods"""

from __future__ import annotations

from childtuning.cli import options as o
from childtuning.cli.printing import print_json, print_table

NAME = "methods"


def run(as_json: o.AsJson = False) -> None:
    """List the ways to fine-tune.

    Example:

        childtuning methods --json
    """
    from childtuning.methods import all_methods

    fields = ("name", "summary", "trains", "density", "source")
    listed = [{field: getattr(method, field) for field in fields} for method in all_methods()]
    if as_json:
        print_json({"methods": listed})
    else:
        rows = [[entry["name"], entry["summary"], entry["trains"], entry["source"]] for entry in listed]
        print_table(None, ("method", "what it does", "trains", "source"), rows, left=4)
