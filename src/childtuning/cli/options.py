"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from childtuning.experiments.run_config import RunConfig, read_toml


def _option(panel: str, text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel)


_data, _model, _child, _training = "Data", "Model", "Child", "Training"

Task = Annotated[
    str | None, _option(_data, "A task by name: a GLUE name, a folder of --data-dir, or docstrings.")
]
TaskKind = Annotated[
    str | None,
    _option(
        _data,
        "classification, regression, token-classification, causal-lm or image-classification.  "
        "\\[as the training file looks]",
    ),
]
TrainFile = Annotated[
    str | None,
    _option(
        _data,
        "Training examples: csv, tsv, jsonl, parquet, conll or txt, each also .gz; "
        "or images: a folder, npz or idx.",
        "--train",
    ),
]
EvalFile = Annotated[str | None, _option(_data, "Examples to measure on, in the same form.", "--eval")]
Text = Annotated[str | None, _option(_data, "Column of the text, tokens or prompt; guessed when left out.")]
TextPair = Annotated[str | None, _option(_data, "Column of the second text, for pairs.")]
Label = Annotated[
    str | None, _option(_data, "Column of the label, tags or response.  \\[label, tags, response]")
]
LabelType = Annotated[str | None, _option(_data, "class, number, or auto.  \\[auto]")]
DataDir = Annotated[
    str | None, _option(_data, "Folder that holds TASK/ with both splits; asked before the hub.")
]
TrainLimit = Annotated[int | None, _option(_data, "Use this many training examples at most.")]
HeldOut = Annotated[
    float | None, _option(_data, "Share of the training examples to set aside and score apart.  \\[0]")
]
Elsewhere = Annotated[
    list[str] | None,
    _option(
        _data, "Score on another task of --data-dir as well, by label mapping: sick, snli/test; repeatable."
    ),
]
Model = Annotated[str | None, _option(_model, "Model folder or hub name.  \\[packaged all-MiniLM-L6-v2]")]
InitFrom = Annotated[
    str | None,
    _option(_model, "Start from this run's tuned network with a new head, or from a model folder."),
]
Method = Annotated[str | None, _option(_child, "See `childtuning methods`.  \\[child-d]")]
Density = Annotated[
    str | None, _option(_child, "Share of the entries in the child, in (0, 1]; auto: what --mass needs.")
]
Mass = Annotated[
    float | None, _option(_child, "With --density auto: share of the scores to hold, in (0, 1].  \\[0.9]")
]
Granularity = Annotated[
    str | None, _option(_child, "What is chosen as one: element, row, block or parameter.  \\[element]")
]
Scope = Annotated[str | None, _option(_child, "Rank all together (global) or in each parameter.  \\[global]")]
Estimator = Annotated[str | None, _option(_child, "Fisher per-example or per-batch.  \\[per-example]")]
FisherLabels = Annotated[str | None, _option(_child, "Labels for Fisher: data or sampled.  \\[data]")]
FisherExamples = Annotated[int | None, _option(_child, "Estimate Fisher from this many examples at most.")]
FisherDevice = Annotated[str | None, _option(_child, "Keep Fisher scores on model or cpu.  \\[model]")]
FisherDtype = Annotated[
    str | None, _option(_child, "Keep Fisher scores in float32 or bfloat16.  \\[float32]")
]
Eligible = Annotated[list[str] | None, _option(_child, "Pattern of parameters to choose from; repeatable.")]
Always = Annotated[
    list[str] | None, _option(_child, "Pattern of parameters trained whole; repeatable.  \\[the new head]")
]
Rescale = Annotated[
    bool | None,
    typer.Option("--rescale/--no-rescale", help="Divide gradients by the density.", rich_help_panel=_child),
]
ReleaseGradients = Annotated[
    bool | None,
    typer.Option(
        "--release-gradients/--keep-gradients",
        help="Free each dense gradient once the child's entries are taken.  \\[on for a fixed child]",
        rich_help_panel=_child,
        show_default=False,
    ),
]
Preset = Annotated[str | None, _option(_child, "official: child, masks and update of the paper's code.")]
LearningRate = Annotated[
    float | None, _option(_training, "Peak learning rate.  \\[2e-5]", "--learning-rate", "--lr")
]
Epochs = Annotated[float | None, _option(_training, "Passes over the training set.  \\[3]")]
BatchSize = Annotated[int | None, _option(_training, "Examples a batch.  \\[16]")]
Accumulation = Annotated[
    int | None, _option(_training, "Batches an optimizer step.  \\[1]", "--gradient-accumulation")
]
WarmupRatio = Annotated[float | None, _option(_training, "Share of the steps to warm up.  \\[0.1]")]
WeightDecay = Annotated[float | None, _option(_training, "Decay of trained weights.  \\[0.01]")]
MaxGradNorm = Annotated[float | None, _option(_training, "Clip gradients to this norm; 0: never.  \\[1]")]
MaxLength = Annotated[int | None, _option(_training, "Tokens an example.  \\[128]")]
Precision = Annotated[
    str | None, _option(_training, "fp32, bf16 autocast, or auto: bf16 where native.  \\[fp32]")
]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile", help="Run the model through torch.compile.", rich_help_panel=_training
    ),
]
Seed = Annotated[int | None, _option(_training, "Of head, order, dropout and masks.  \\[0]")]
DataSeed = Annotated[int | None, _option(_data, "Of what --train-limit and --held-out draw.  \\[0]")]
SaveSteps = Annotated[int | None, _option(_training, "Steps between checkpoints.  \\[every epoch]")]
ReportTo = Annotated[
    list[str] | None, _option(_training, "Log to tensorboard, wandb, mlflow, … as well; repeatable.")
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="TOML file of these options, as a run writes it; options given here win."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on standard output.")]
RunDir = Annotated[Path, typer.Argument(help="The output folder of `childtuning train`.", show_default=False)]


def run_config(config_file: Path | None, given: dict[str, Any]) -> RunConfig:
    """Put the options that were given over those of the file.

    Naming a task sets aside the file's own examples, and the reverse.
    """
    options = (
        {key.replace("-", "_"): value for key, value in read_toml(config_file).items()} if config_file else {}
    )
    explicit = {key: value for key, value in given.items() if value is not None and value != []}
    if "method" in explicit and explicit["method"] != options.get("method"):
        options.pop("density", None)  # the file's is another method's
    if "task" in explicit:
        options = {key: value for key, value in options.items() if key not in ("train", "eval")}
    if "train" in explicit or "eval" in explicit:
        options.pop("task", None)
    return RunConfig.from_options(options | explicit)
