"""Cross-validation: each part of the training examples is answered by a model that was trained on the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from childtuning.errors import DataError, ModelError
from childtuning.ranks import wait_for_all
from childtuning.runs.config import RunConfig
from childtuning.runs.evaluate import Fold
from childtuning.runs.folder import RunResult
from childtuning.runs.inputs import Inputs
from childtuning.runs.predict import FinishedRun

_FEW = 10  # examples
_MEANS = (
    "accuracy",
    "log-loss",
    "mae",
    "loss",
)  # over the examples, so that the mean over the folds is the same


def train_folds(
    config: RunConfig,
    folder: Path,
    inputs: Inputs,
    train_fn: Callable[[RunConfig, Path], RunResult],
    tell: Callable[[str], None],
) -> list[Fold]:
    """Train and evaluate once for each fold.

    Args:
        config: the run, with ``folds``; each fold has the same options, also those that the run chose.
        folder: each fold's run is in a folder of its own there.
        inputs: load its examples.
        train_fn: trains a run, or returns the result of one that is finished.
        tell: called with a line for each fold.
    """
    assert config.folds is not None
    folds = [replace(config, fold=number) for number in range(1, config.folds + 1)]
    found = []
    for number, fold in enumerate(folds, start=1):
        result = train_fn(fold, folder / str(number))
        wait_for_all()  # its last file is written
        if result.diverged_at is not None:
            raise ModelError(
                f"fold {number} of {config.folds} diverged at step {result.diverged_at}: its loss is not finite. Start "
                "again with a lower --lr and --overwrite."
            )
        name, constant = result.metric["name"], (result.constant or {}).get(result.metric["name"])
        beside = "" if constant is None else f" (the same answer for every example: {constant:.4f})"
        tell(f"fold {number} of {config.folds}: {name} {result.metric['value']:.4f}{beside}")
        task, _ = inputs.task(fold)
        found.append(Fold(task.train, FinishedRun(folder / str(number)).answered(task.dev)))
    return found


def check_folds(config: RunConfig, inputs: Inputs, tell: Callable[[str], None]) -> None:
    """Check that each fold can be trained and measured, before any is.

    Raises:
        DataError: naming the first that cannot.
    """
    assert config.folds is not None
    sizes = []
    for number in range(1, config.folds + 1):
        try:
            task, _ = inputs.task(replace(config, fold=number))
        except DataError as fault:
            raise DataError(f"fold {number} of {config.folds}: {fault} Or pass fewer --folds.") from None
        sizes.append(len(task.dev))
    name = task.metrics[0]
    if min(sizes) < _FEW and name not in _MEANS:
        tell(
            f"warning: {name} of folds of {min(sizes)} examples means little. Pass fewer --folds, or another --metric."
        )
