"""childtuning plan"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from childtuning.cli import options as o
from childtuning.cli.printing import human_bytes, print_json, print_table

NAME = "plan"
_COLUMNS = ("method", "trained", "weights", "gradients", "optimizer", "sum", "delta")


def run(
    model: Annotated[str | None, typer.Option(help="Model folder or hub name.  \\[the packaged one]")] = None,
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = "full,child-f,child-d",
    density: Annotated[float | None, typer.Option(help="Share of the entries in a child.")] = None,
    granularity: Annotated[str, typer.Option(help="element, row, column, block or parameter.")] = "element",
    labels: Annotated[int, typer.Option(help="Classes of the new head.", min=1, max=100_000)] = 2,
    bf16: Annotated[bool, typer.Option("--bf16", help="Weights in bf16.")] = False,
    as_json: o.AsJson = False,
) -> None:
    """Count the memory that methods need for a model, without loading its weights; activations come on top.

    Example:

        childtuning plan --methods full,child-d,child-d+r3f --density 0.1
    """
    from childtuning.compare import read_methods
    from childtuning.config import ChildConfig
    from childtuning.runs.plan import plan_memory

    chosen = {} if density is None else {"density": density}
    config = ChildConfig(**chosen, granularity=granularity) if chosen or granularity != "element" else None  # type: ignore[arg-type]
    plans = plan_memory(model, list(read_methods([methods])), config, num_labels=labels, bf16=bf16)
    if as_json:
        print_json({"methods": [{**asdict(plan), "total": plan.total} for plan in plans]})
        return
    sizes = [(p.weights, p.gradients, p.optimizer, p.total, p.delta) for p in plans]
    rows = [
        [p.method, f"{p.trained_parameters:,}", *map(human_bytes, own)]
        for p, own in zip(plans, sizes, strict=True)
    ]
    print_table("Memory beside activations, AdamW, one process", _COLUMNS, rows)
