"""Options that several commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from childtuning.runs.config import RunConfig, read_toml


def _option(panel: str, kind: Any, text: str, *names: str) -> Any:
    return Annotated[kind | None, typer.Option(*names, help=text, rich_help_panel=panel, show_default=False)]


_data, _model, _child, _training = (
    partial(_option, panel) for panel in ("Data", "Model", "Child", "Training")
)

# By panel, in the order of the help.
DATA: dict[str, Any] = {
    "task": _data(str, "A task by name: a GLUE name, a folder of --data-dir, or docstrings."),
    "task_kind": _data(
        str,
        "classification, regression, token-classification, causal-lm or image-classification.  "
        "\\[as the training file looks]",
    ),
    "train": _data(
        str,
        "Training examples: csv, tsv, jsonl, parquet, conll or txt, each also .gz; or images: a "
        "folder, npz or idx.",
    ),
    "eval": _data(str, "Examples to measure on, in the same form."),
    "text": _data(str, "Column of the text, tokens or prompt; guessed when left out."),
    "text_pair": _data(str, "Column of the second text, for pairs."),
    "label": _data(str, "Column of the label, tags or response.  \\[label, tags, response]"),
    "label_type": _data(str, "class, number, or auto.  \\[auto]"),
    "data_dir": _data(str, "Folder that holds TASK/ with both splits; asked before the hub."),
    "train_limit": _data(int, "Use this many training examples at most."),
    "eval_limit": _data(
        int, "Measure on this many evaluation examples at most, and of those held out and each --elsewhere."
    ),
    "data_seed": _data(int, "Of what --train-limit, --eval-limit and --held-out draw.  \\[0]"),
    "held_out": _data(float, "Share of the training examples to set aside and score apart.  \\[0]"),
    "elsewhere": _data(
        list[str],
        "Score on another task of --data-dir as well, by label mapping: sick, snli/test; repeatable.",
    ),
}
MODEL: dict[str, Any] = {
    "model": _model(str, "Model folder or hub name.  \\[packaged all-MiniLM-L6-v2]"),
    "init_from": _model(str, "Start from this run's tuned network with a new head, or from a model folder."),
}
CHILD: dict[str, Any] = {
    "method": _child(str, "See `childtuning methods`.  \\[child-d]"),
    "density": _child(str, "Share of the entries in the child, in (0, 1]; auto: what --mass needs."),
    "mass": _child(float, "With --density auto: share of the scores to hold, in (0, 1].  \\[0.9]"),
    "granularity": _child(str, "What is chosen as one: element, row, block or parameter.  \\[element]"),
    "scope": _child(str, "Rank all together (global) or in each parameter.  \\[global]"),
    "estimator": _child(str, "Fisher per-example or per-batch.  \\[per-example]"),
    "fisher_labels": _child(str, "Labels for Fisher: data or sampled.  \\[data]"),
    "fisher_examples": _child(int, "Estimate Fisher from this many examples at most."),
    "fisher_device": _child(str, "Keep Fisher scores on model or cpu.  \\[model]"),
    "fisher_dtype": _child(str, "Keep Fisher scores in float32 or bfloat16.  \\[float32]"),
    "eligible": _child(list[str], "Pattern of parameters to choose from; repeatable."),
    "always": _child(list[str], "Pattern of parameters trained whole; repeatable.  \\[the new head]"),
    "rescale": _child(bool, "Divide gradients by the density.", "--rescale/--no-rescale"),
    "release_gradients": _child(
        bool,
        "Free each dense gradient once the child's entries are taken.  \\[on for a fixed child]",
        "--release-gradients/--keep-gradients",
    ),
    "preset": _child(str, "official: child, masks and update of the paper's code."),
}
TRAINING: dict[str, Any] = {
    "learning_rate": _training(float, "Peak learning rate.  \\[2e-5]", "--learning-rate", "--lr"),
    "epochs": _training(float, "Passes over the training set.  \\[3]"),
    "batch_size": _training(int, "Examples a batch.  \\[16]"),
    "gradient_accumulation": _training(int, "Batches an optimizer step.  \\[1]"),
    "warmup_ratio": _training(float, "Share of the steps to warm up.  \\[0.1]"),
    "weight_decay": _training(float, "Decay of trained weights.  \\[0.01]"),
    "max_grad_norm": _training(float, "Clip gradients to this norm; 0: never.  \\[1]"),
    "max_length": _training(int, "Tokens an example.  \\[128]"),
    "precision": _training(str, "fp32, bf16 autocast, or auto: bf16 where native.  \\[fp32]"),
    "compile": _training(bool, "Run the model through torch.compile.", "--compile/--no-compile"),
    "seed": _training(int, "Of head, order, dropout and masks.  \\[0]"),
    "save_steps": _training(int, "Steps between checkpoints.  \\[every epoch]"),
    "report_to": _training(list[str], "Log to tensorboard, wandb, mlflow, … as well; repeatable."),
}
SHARED: dict[str, Any] = {**DATA, **MODEL, **CHILD, **TRAINING}

_Command = TypeVar("_Command", bound=Callable[..., None])
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="TOML file of these options, as a run writes it; options given here win."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on standard output.")]
RunDir = Annotated[Path, typer.Argument(help="The output folder of `childtuning train`.", show_default=False)]


def takes(names: Iterable[str]) -> Callable[[_Command], _Command]:
    """Give a command the shared options of these names; it finds them in its ``**given``, ``None`` where left out."""

    def decorate(run: _Command) -> _Command:
        signature = inspect.signature(run, eval_str=True)
        *own, _ = signature.parameters.values()
        keyword = inspect.Parameter.KEYWORD_ONLY
        shared = [inspect.Parameter(name, keyword, default=None, annotation=SHARED[name]) for name in names]
        run.__signature__ = signature.replace(parameters=[*own, *shared])  # type: ignore[attr-defined]
        run.__annotations__ |= {option.name: option.annotation for option in shared}
        return run

    return decorate


def explicit(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given."""
    return {name: value for name, value in given.items() if value is not None and value != []}


def run_config(config_file: Path | None, given: dict[str, Any]) -> RunConfig:
    """Put the options that were given over those of the file.

    Naming a task sets aside the file's own examples, and the reverse.
    """
    options = (
        {key.replace("-", "_"): value for key, value in read_toml(config_file).items()} if config_file else {}
    )
    said = explicit(given)
    if "method" in said and said["method"] != options.get("method"):
        options.pop("density", None)  # the file's is another method's
    if "task" in said:
        options = {key: value for key, value in options.items() if key not in ("train", "eval")}
    if "train" in said or "eval" in said:
        options.pop("task", None)
    return RunConfig.from_options(options | said)
