"""childtuning export"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from childtuning.cli import options as o
from childtuning.cli.printing import human_bytes, is_terminal, print_json, tell
from childtuning.errors import ConfigError

NAME = "export"


def run(
    run_dir: o.RunDir,
    output: Annotated[Path, typer.Option(help="Folder to write; new or empty.")],
    to: Annotated[
        str,
        typer.Option(
            help="model (a folder for transformers), patch (of the base's checkpoint), peft, hub (what `push` sends)."
        ),
    ] = "model",
    base: Annotated[
        str | None,
        typer.Option(help="For hub: the base model's name there, if the run was trained from a folder."),
    ] = None,
    as_json: o.AsJson = False,
) -> None:
    """Write a run's model as servers read it: a whole model, or what differs from the base model.

    Example:

        childtuning export runs/rte --to model --output models/rte

        childtuning export runs/rte --to patch --output patches/rte
    """
    if base is not None and to != "hub":
        raise ConfigError(f"--base names the base model on the hub, got --to {to}. Leave it out.")
    from childtuning.runs import load

    opened = load(run_dir, tell=tell)
    if not is_terminal():
        from transformers.utils import logging

        logging.disable_progress_bar()
    output = opened.export(output, to, base=base)  # type: ignore[arg-type]
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    if as_json:
        print_json({"run": str(run_dir), "to": to, "output": str(output), "bytes": size})
    elif to == "model":
        print(f"{opened.kind.auto_model}.from_pretrained({str(output)!r})")
    else:
        print(f"{output}: {human_bytes(size)}")
