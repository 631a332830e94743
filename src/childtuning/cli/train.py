"""childtuning train"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from childtuning.cli import options as o
from childtuning.cli.printing import (
    human_bytes,
    interval_text,
    is_terminal,
    print_classes,
    print_facts,
    print_json,
    score_text,
    tell,
)

if TYPE_CHECKING:
    from childtuning.runs.folder import RunResult

NAME = "train"


@o.takes(o.SHARED)
def run(
    *,
    config: o.ConfigFile = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the run.  \\[runs/TASK-METHOD-SEED]", show_default=False)
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue a run that was stopped; the result is bitwise the same."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what was understood of the examples, and stop.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run in the folder.")
    ] = False,
    as_json: o.AsJson = False,
    **given: Any,
) -> None:
    """Fine-tune a model on a task or on files of your own.

    Example:

        childtuning train --task rte --data-dir data --method child-d --density 0.3 --output runs/rte

        childtuning train --train a.csv --eval b.jsonl --text review --label stars --output runs/mine
    """
    settings = o.run_config(config, given)
    from childtuning.runs import train_run, understand_run
    from childtuning.runs.config import name_of_data

    if dry_run:
        found = understand_run(settings, tell=tell)
        if as_json:
            print_json(found.to_dict())
        else:
            print(*found.lines(), sep="\n")
        return
    name = settings.task or name_of_data(settings.train or "")
    method = re.sub(r"[^\w.+-]+", "-", settings.method)  # some file systems forbid other characters
    folder = output or Path("runs") / f"{name}-{method}-{settings.seed}"
    result = train_run(
        settings, folder, overwrite=overwrite, resume=resume, progress=is_terminal(), tell=tell
    )
    if as_json:
        print_json(result.to_dict())
    else:
        _print(result)
    for remark in result.remarks:
        tell(f"warning: {remark}")
    if result.fault is not None:
        tell(f"childtuning: {result.fault}")
        raise typer.Exit(1)
    if not as_json:
        tell(f"Next: childtuning predict {result.output} --input FILE")
        tell(f"      childtuning export {result.output} --output MODEL_DIR")


def _print(result: RunResult) -> None:
    num_beside = result.trained_parameters - result.child_parameters
    constant = result.constant or {}
    beside = f", and {num_beside:,} others" if num_beside else ""
    print_facts(
        {
            **{
                name: score_text(value)
                + (interval_text(result.interval) if name == result.metric["name"] else "")
                + _beside(None if name == "calibration-error" else constant.get(name))
                for name, value in result.metrics.items()
            },
            **_of_folds(result),
            **{f"{name}, held out": score_text(value) for name, value in (result.held_out or {}).items()},
            **{f"on {name}": score_text(found["accuracy"]) for name, found in result.elsewhere.items()},
            "trained": f"{result.trained_parameters:,} entries ({result.density:.1%} of the eligible{beside})",
            **_chosen(result),
            "optimizer state": human_bytes(result.state_bytes),
            "delta": human_bytes(result.delta_bytes),
            "time": _last_of(result)
            + f"{result.fisher_seconds:.0f} s to choose the child, {result.train_seconds:.0f} s to train",
            "peak memory": human_bytes(result.peak_memory_bytes),
            "run": result.output,
        }
    )
    if result.per_class is not None:
        print_classes(result.per_class, result.confusion)


def _beside(constant: float | None) -> str:
    return "" if constant is None else f"  (the same answer for every example: {score_text(constant)})"


def _last_of(result: RunResult) -> str:
    return f"of the last of {len(result.folds) + 1} trainings: " if result.folds else ""


def _of_folds(result: RunResult) -> dict[str, str]:
    name = result.metric["name"]
    values = [score_text(fold[name]) for fold in result.folds]
    return {f"{name}, by fold": ", ".join(values)} if values else {}


def _chosen(result: RunResult) -> dict[str, str]:
    """Return what the held-out examples have decided."""
    found = {}
    if result.checkpoint is not None:
        found["checkpoint"] = (
            f"step {result.checkpoint['step']} of {result.checkpoint['of']}, the best on the held-out examples"
        )
    if result.temperature is not None:
        found["temperature"] = f"{result.temperature:.3f}, the logits' divisor, is in the head's weights"
    return found
