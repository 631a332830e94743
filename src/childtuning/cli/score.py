"""childtuning score"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from childtuning.cli import options as o
from childtuning.cli.printing import is_terminal, print_json, print_table, tell
from childtuning.errors import ConfigError

NAME = "score"


def run(
    output: Annotated[Path, typer.Option(help="Write the scores here, as safetensors.")],
    task: o.Task = None,
    task_kind: o.TaskKind = None,
    train: o.TrainFile = None,
    eval: o.EvalFile = None,
    text: o.Text = None,
    text_pair: o.TextPair = None,
    label: o.Label = None,
    label_type: o.LabelType = None,
    data_dir: o.DataDir = None,
    train_limit: o.TrainLimit = None,
    model: o.Model = None,
    init_from: o.InitFrom = None,
    density: o.Density = None,
    mass: o.Mass = None,
    estimator: o.Estimator = None,
    fisher_labels: o.FisherLabels = None,
    fisher_examples: o.FisherExamples = None,
    fisher_device: o.FisherDevice = None,
    fisher_dtype: o.FisherDtype = None,
    eligible: o.Eligible = None,
    always: o.Always = None,
    batch_size: o.BatchSize = None,
    max_length: o.MaxLength = None,
    seed: o.Seed = None,
    config: o.ConfigFile = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    as_json: o.AsJson = False,
) -> None:
    """Estimate Fisher information only, and show where a child of some density would live.

    Example:

        childtuning score --task rte --data-dir data --output rte-fisher.safetensors
    """
    given = {
        name: value
        for name, value in locals().items()
        if name not in ("config", "output", "overwrite", "as_json")
    }
    from childtuning.experiments import score_run

    output = output.expanduser()
    if output.is_dir():
        raise ConfigError(f"output {str(output)!r} is a folder. Pass a file.")
    if output.exists() and not overwrite:
        raise ConfigError(f"output file {str(output)!r} exists already. Pass --overwrite, or another.")
    if eval is None and train is not None:
        given["eval"] = train
    result: dict[str, Any] = score_run(o.run_config(config, given), output, progress=is_terminal(), tell=tell)
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
