"""childtuning push"""

from __future__ import annotations

from typing import Annotated

import typer

from childtuning.cli import options as o
from childtuning.cli.printing import print_json, tell

NAME = "push"


def run(
    run_dir: o.RunDir,
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face hub.", show_default=False)],
    base: Annotated[
        str | None,
        typer.Option(help="The base model's name on the hub, if the run was trained from a folder."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Let only its owner see it.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch.  \\[main]", show_default=False)] = None,
    as_json: o.AsJson = False,
) -> None:
    """Upload a run to the Hugging Face hub: the delta, a model card and a certificate; no example, no base model.

    `export --to hub` writes the same to a folder. Log in first: `hf auth login`.

    Example:

        childtuning push runs/rte me/rte-child --base microsoft/mpnet-base
    """
    from childtuning.runs import load

    opened = load(run_dir, tell=tell)
    url = opened.push_to_hub(repo_id, base=base, private=private or None, revision=revision)
    if as_json:
        print_json({"run": str(run_dir), "repo_id": repo_id, "url": url})
    else:
        print(url)
        print(f'childtuning.load("hf://{repo_id}")')
