"""childtuning score"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from childtuning.cli import options as o
from childtuning.cli.printing import is_terminal, print_json, print_table, tell
from childtuning.errors import ConfigError

NAME = "score"


_OF_TESTS = ("eval_limit", "data_seed", "held_out", "folds", "fold", "elsewhere")
_OPTIONS = [
    *(
        name
        for name in o.SECTION["Data"]
        if name not in ("eval_limit", "data_seed", "held_out", "folds", "fold", "elsewhere")
    ),
    *o.SECTION["Model"],
    *("density", "mass", *(name for name in o.SECTION["Child"] if "fisher" in name or name == "estimator")),
    *("eligible", "always", "batch_size", "max_length", "seed"),
]


@o.takes(_OPTIONS)
def run(
    *,
    output: Annotated[Path, typer.Option(help="Write the scores here, as safetensors.")],
    config: o.ConfigFile = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    as_json: o.AsJson = False,
    **given: Any,
) -> None:
    """Estimate Fisher information only, and show which parameters a child of a given density would cover.

    Example:

        childtuning score --task rte --data-dir data --output rte-fisher.safetensors
    """
    output = output.expanduser()
    if output.is_dir():
        raise ConfigError(f"output {str(output)!r} is a folder. Pass a file.")
    if output.exists() and not overwrite:
        raise ConfigError(f"output file {str(output)!r} already exists. Pass --overwrite, or another.")
    settings = o.run_config(config, given)
    from childtuning.runs import score_run

    result: dict[str, Any] = score_run(settings, output, progress=is_terminal(), tell=tell)
    if as_json:
        print_json(result)
        return
    rows = [
        [name, f"{entry['mean']:.3e}", f"{entry['share']:.2%}"]
        for name, entry in result["parameters"].items()
    ]
    print_table(
        f"a child of density {result['density']:.2g}", ("parameter", "mean Fisher", "in the child"), rows
    )
