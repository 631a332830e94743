"""childtuning evaluate"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from childtuning.cli import options as o
from childtuning.cli.printing import (
    interval_text,
    is_terminal,
    print_classes,
    print_facts,
    print_json,
    score_text,
    tell,
)

NAME = "evaluate"


def run(
    run_dir: o.RunDir,
    eval: Annotated[Path, typer.Option("--eval", help="File or folder of labelled examples.")],
    encoding: o.Encoding = None,
    sheet: o.Sheet = None,
    as_json: o.AsJson = False,
) -> None:
    """Evaluate a run's model on labelled examples.

    Example:

        childtuning evaluate runs/rte --eval test.jsonl.gz
    """
    o.check_files(eval)
    from childtuning.runs import load

    opened = load(run_dir, progress=is_terminal(), tell=tell)
    source = opened.source(eval, labelled=True, encoding=encoding, sheet=sheet)
    examples = opened.read_input(source, labelled=True)
    if examples.num_empty:
        tell(f"rows with empty text: {examples.num_empty:,}")
    found = opened.judge(examples)
    if as_json:
        print_json({"run": str(run_dir), "eval": str(eval), "examples": len(examples), **asdict(found)})
        return
    main = next(iter(found.metrics))
    print_facts(
        {
            "examples": str(len(examples)),
            **{
                name: score_text(value) + (interval_text(found.interval) if name == main else "")
                for name, value in found.metrics.items()
            },
        }
    )
    if found.per_class is not None:
        print_classes(found.per_class, found.confusion)
    if found.errors:
        print("most confident errors:")
    for error in found.errors:
        print(
            f"{error['confidence']:.3f}  {error['prediction']}, but the label is {error['label']}:  {error['text']}"
        )
