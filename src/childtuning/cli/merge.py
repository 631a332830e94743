"""childtuning merge"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from childtuning.cli import options as o
from childtuning.cli.printing import is_terminal, print_json, tell

NAME = "merge"


def run(
    run_dir: o.RunDir,
    output: Annotated[Path, typer.Option(help="Folder for the model; new or empty.")],
    as_json: o.AsJson = False,
) -> None:
    """Merge base model and delta into an ordinary model folder for transformers.

    Example:

        childtuning merge runs/rte --output models/rte
    """
    from childtuning.runs import load

    opened = load(run_dir, tell=tell)
    if not is_terminal():
        from transformers.utils import logging

        logging.disable_progress_bar()
    output = opened.merge(output)
    if as_json:
        print_json({"run": str(run_dir), "output": str(output)})
    else:
        print(f"{opened.kind.auto_model}.from_pretrained({str(output)!r})")
