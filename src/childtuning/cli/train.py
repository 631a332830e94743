"""childtuning train"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from childtuning.cli import options as o
from childtuning.cli.printing import human_bytes, is_terminal, print_facts, print_json, tell

NAME = "train"


def run(
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
    data_seed: o.DataSeed = None,
    held_out: o.HeldOut = None,
    elsewhere: o.Elsewhere = None,
    model: o.Model = None,
    init_from: o.InitFrom = None,
    method: o.Method = None,
    density: o.Density = None,
    mass: o.Mass = None,
    granularity: o.Granularity = None,
    scope: o.Scope = None,
    estimator: o.Estimator = None,
    fisher_labels: o.FisherLabels = None,
    fisher_examples: o.FisherExamples = None,
    fisher_device: o.FisherDevice = None,
    fisher_dtype: o.FisherDtype = None,
    eligible: o.Eligible = None,
    always: o.Always = None,
    rescale: o.Rescale = None,
    release_gradients: o.ReleaseGradients = None,
    preset: o.Preset = None,
    learning_rate: o.LearningRate = None,
    epochs: o.Epochs = None,
    batch_size: o.BatchSize = None,
    gradient_accumulation: o.Accumulation = None,
    warmup_ratio: o.WarmupRatio = None,
    weight_decay: o.WeightDecay = None,
    max_grad_norm: o.MaxGradNorm = None,
    max_length: o.MaxLength = None,
    precision: o.Precision = None,
    compile: o.Compile = None,
    seed: o.Seed = None,
    save_steps: o.SaveSteps = None,
    report_to: o.ReportTo = None,
    config: o.ConfigFile = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the run.  \\[runs/TASK-METHOD-SEED]", show_default=False)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was stopped; bitwise.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run in the folder.")
    ] = False,
    as_json: o.AsJson = False,
) -> None:
    """Fine-tune a model on a task or on files of your own.

    Example:

        childtuning train --task rte --data-dir data --method child-d --density 0.3 --output runs/rte

        childtuning train --train a.csv --eval b.jsonl --text review --label stars --output runs/mine
    """
    given = {name: value for name, value in locals().items() if name not in _NOT_OPTIONS}
    from childtuning.experiments import train_run

    settings = o.run_config(config, given)
    name = settings.task or Path(settings.train or "").name.split(".")[0]
    method = re.sub(r"[^\w.+-]+", "-", settings.method)  # options hold signs that some systems' names do not
    folder = output or Path("runs") / f"{name}-{method}-{settings.seed}"
    result = train_run(
        settings, folder, overwrite=overwrite, resume=resume, progress=is_terminal(), tell=tell
    )
    if as_json:
        print_json(result.to_dict())
        return
    num_beside = result.trained_parameters - result.child_parameters
    beside = f", and {num_beside:,} beside them" if num_beside else ""
    print_facts(
        {
            **{name: f"{value:.4f}" for name, value in result.metrics.items()},
            **{f"{name}, held out": f"{value:.4f}" for name, value in (result.held_out or {}).items()},
            **{f"on {name}": f"{found['accuracy']:.4f}" for name, found in result.elsewhere.items()},
            "trained": f"{result.trained_parameters:,} entries ({result.density:.1%} of the eligible{beside})",
            "optimizer state": human_bytes(result.state_bytes),
            "delta": human_bytes(result.delta_bytes),
            "time": f"{result.fisher_seconds:.0f} s to choose the child, {result.train_seconds:.0f} s to train",
            "peak memory": human_bytes(result.peak_memory_bytes),
            "run": result.output,
        }
    )


_NOT_OPTIONS = ("config", "output", "resume", "overwrite", "as_json")
