"""childtuning plan"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from childtuning.cli import options as o
from childtuning.cli.printing import human_bytes, print_json, print_table, tell

NAME = "plan"
_COLUMNS = (
    "method",
    "trained",
    "weights",
    "activations",
    "gradients",
    "optimizer",
    "peak",
    "scoring",
    "delta",
)


def run(
    model: Annotated[str | None, typer.Option(help="Model folder or hub name.  \\[the packaged one]")] = None,
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = "full,child-f,child-d",
    density: Annotated[float | None, typer.Option(help="Share of the entries in a child.")] = None,
    granularity: Annotated[str, typer.Option(help="element, row, column, block or parameter.")] = "element",
    task_kind: Annotated[str, typer.Option(help="Kind of task, as for `train`.")] = "classification",
    labels: Annotated[int, typer.Option(help="Classes of the new head.", min=1, max=100_000)] = 2,
    batch_size: Annotated[int, typer.Option(help="Examples per forward pass.", min=1, max=100_000)] = 16,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens per example.  \\[128, or the model's]", min=1, max=10_000_000)
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Weights in bf16, whatever the model's are.")] = False,
    as_json: o.AsJson = False,
) -> None:
    """Count the memory that methods need for a model, without loading its weights.

    Example:

        childtuning plan --methods full,child-d,lora --density 0.1 --granularity column --batch-size 32
    """
    from childtuning.compare import read_methods
    from childtuning.config import ChildConfig
    from childtuning.runs.plan import plan_memory

    chosen = {} if density is None else {"density": density}
    config = ChildConfig(**chosen, granularity=granularity) if chosen or granularity != "element" else None  # type: ignore[arg-type]
    plans = plan_memory(
        model,
        list(read_methods([methods])),
        config,
        task_kind=task_kind,
        num_labels=labels,
        batch_size=batch_size,
        max_length=max_length,
        bf16=bf16,
    )
    for p in plans:
        if p.note:
            tell(f"{p.method}: activations are not counted: {p.note}")
    if as_json:
        print_json({"methods": [asdict(plan) for plan in plans]})
        return
    rows = [
        [
            p.method,
            f"{p.trained_parameters:,}",
            human_bytes(p.weights),
            "?" if p.activations is None else human_bytes(p.activations),
            human_bytes(p.gradients),
            human_bytes(p.optimizer),
            human_bytes(p.peak) + "+" * (p.activations is None),
            human_bytes(p.scoring) + "+" * (p.activations is None) if p.scoring else "-",
            human_bytes(p.delta),
        ]
        for p in plans
    ]
    print_table(f"Memory, AdamW, one process, batches of {batch_size}", _COLUMNS, rows)
