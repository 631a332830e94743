"""childtuning verify"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from childtuning.cli import options as o
from childtuning.cli.printing import print_facts, print_json

NAME = "verify"


def run(
    certificate: Annotated[
        Path | None, typer.Argument(help="Folder that `inspect --certificate` wrote.", show_default=False)
    ] = None,
    base: Annotated[Path, typer.Option(help="Folder of the base model.")] = ...,  # type: ignore[assignment]
    model: Annotated[Path, typer.Option(help="Folder of the tuned model.")] = ...,  # type: ignore[assignment]
    trained: Annotated[
        list[str] | None,
        typer.Option(
            help="Without a certificate: what may have moved, NAME or NAME\\[a:b] (rows); repeatable."
        ),
    ] = None,
    as_json: o.AsJson = False,
) -> None:
    """Check that a tuned model is its base model but for what was trained, bit by bit.

    The exit code is 0 if it is, and 1 with the first entry that moved if it is not. The models may be of any origin.

    Example:

        childtuning verify runs/rte/certificate --base models/base --model models/rte

        childtuning verify --base models/base --model models/other --trained "*.layers.3.*" --trained "*embed*[:9]"
    """
    from childtuning.runs.certify import verify

    verdict = verify(base, model, certificate, trained or ())
    if as_json:
        print_json(verdict.to_dict())
    else:
        compared = f"{verdict.tensors} tensors, {verdict.entries:,} entries"
        moved = f"{verdict.moved:,} entries, of {verdict.trained:,} that may"
        root = {"root": verdict.root} if verdict.root else {}
        answer = "yes" if verdict.holds else f"no: {verdict.reason}"
        print_facts({"compared": compared, "moved": moved, **root, "holds": answer})
    if not verdict.holds:
        raise typer.Exit(1)
