"""childtuning evaluate"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from childtuning.cli import options as o
from childtuning.cli.printing import is_terminal, print_facts, print_json, tell

NAME = "evaluate"


def run(
    run_dir: o.RunDir,
    eval: Annotated[Path, typer.Option("--eval", help="File or folder of labelled examples.")],
    as_json: o.AsJson = False,
) -> None:
    """Evaluate a run's model on labelled examples.

    Example:

        childtuning evaluate runs/rte --eval test.jsonl.gz
    """
    from childtuning.runs import load

    opened = load(run_dir, progress=is_terminal(), tell=tell)
    examples = opened.read_input(eval, labelled=True)
    if examples.num_empty:
        tell(f"{examples.num_empty} rows have empty text")
    metrics = opened.evaluate(examples)
    if as_json:
        print_json({"run": str(run_dir), "eval": str(eval), "examples": len(examples), "metrics": metrics})
    else:
        print_facts(
            {"examples": str(len(examples)), **{name: f"{value:.4f}" for name, value in metrics.items()}}
        )
