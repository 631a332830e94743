"""Cross-validation: each part of the training examples is answered by a model that was trained on the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from childtuning.optim.processes import wait_for_all
from childtuning.runs.config import RunConfig
from childtuning.runs.evaluate import Fold
from childtuning.runs.folder import RunResult
from childtuning.runs.inputs import Inputs
from childtuning.runs.predict import FinishedRun


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
    found = []
    for number in range(1, config.folds + 1):
        fold, place = replace(config, fold=number), folder / str(number)
        result = train_fn(fold, place)
        wait_for_all()  # its last file is written
        tell(f"fold {number} of {config.folds}: {result.metric['name']} {result.metric['value']:.4f}")
        task, _ = inputs.task(fold)
        found.append(Fold(task.train, FinishedRun(place).answered(task.dev)))
    return found
