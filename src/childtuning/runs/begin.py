"""Begin a run: load examples and model, and settle the options that depend on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from childtuning.child import Budget
from childtuning.child.budget import check_budget
from childtuning.delta import Delta
from childtuning.errors import BaseMismatchError, ConfigError
from childtuning.runs.config import RunConfig
from childtuning.runs.evaluate import Predictor, RunTests, check_tokens, cut_at
from childtuning.runs.inputs import Inputs, apply_start
from childtuning.runs.trainer import build_trainer
from childtuning.runs.understood import Understood, choose_training, estimate_seconds, understood
from childtuning.tasks import Split, Task
from childtuning.tasks.metrics import OF_ONE_CLASS
from childtuning.training import ChildTrainer, LoadedModel

Tell = Callable[[str], None]


class Begun(NamedTuple):
    """The state of a run before the child is chosen: the settled options, examples, model, start, and predictor."""

    config: RunConfig
    reasons: dict[str, str]
    task: Task
    held_out: Split | None
    loaded: LoadedModel
    start: Delta | None
    predictor: Predictor
    train: Any


def begin(
    config: RunConfig, inputs: Inputs, folder: Path | None, tell: Tell, base_hash: str | None = None
) -> Begun:
    """Load examples and model; align the order of labels, the maximum length, the learning rate and the epochs.

    Args:
        folder: the folder of an interrupted run.
        base_hash: that of the base model that is asked for, if it is known.
    Raises:
        BaseMismatchError: when the base model is another one.
    """
    task, held_out = inputs.task(config)
    for note in task.notes:
        tell(note)
    if task.num_empty:
        tell(f"rows with empty text: {task.num_empty:,}; they are kept")
    loaded = inputs.model(config, task)
    if base_hash not in (None, loaded.base_hash):
        raise BaseMismatchError(
            f"the weights of {loaded.name!r} have changed since it was trained on. Restore them, or start anew."
        )
    if loaded.note:
        tell(loaded.note)
    task = task.in_order(loaded.label_names)
    if config.temperature_scaling:
        task = _with_calibration(task)
    if config.metric in OF_ONE_CLASS and len(task.label_names) == 2:
        tell(
            f"{config.metric} is that of the class {task.label_names[1]!r}; macro-f1 weighs both classes equally"
        )
    start = apply_start(config, loaded, folder)
    max_length = cut_at(config, task.rules, loaded.model)
    if max_length < config.max_length:
        tell(f"texts are cut at {max_length} tokens: {loaded.name!r} has no more positions")
    predictor = Predictor(task.rules, loaded.processor, task.label_names, max_length, tell=tell)
    train = inputs.encoded(config, predictor, task.train, "the training examples")
    check_tokens(loaded.model, train)
    config, reasons = choose_training(config, loaded, len(train))
    return Begun(config, reasons, task, held_out, loaded, start, predictor, train)


def _with_calibration(task: Task) -> Task:
    """Return the task with the metrics of probabilities.

    Raises:
        ConfigError: when an example does not have one class.
    """
    if task.rules.truth(task.dev, task.label_names) is None:
        raise ConfigError(f"temperature_scaling needs one class per example, got {task.kind}. Leave it out.")
    return replace(task, metrics=tuple(dict.fromkeys([*task.metrics, "log-loss", "calibration-error"])))


def understanding(begun: Begun, tests: RunTests, trainer: ChildTrainer) -> Understood:
    """Describe what a run will do, with the time that it will take."""
    found = understood(begun.config, begun.task, begun.held_out, begun.train, tests, begun.reasons)
    return replace(found, seconds=estimate_seconds(found, begun.config, trainer, begun.train))


def understand_run(config: RunConfig, *, tell: Tell = lambda line: None) -> Understood:
    """Load and check all that a run needs, and describe it, without training; nothing is written.

    Args:
        config: the options.
        tell: called with lines for the user.
    Raises:
        ConfigError, DataError, ModelError, ParameterError: as ``train_run`` does.
    """
    inputs = Inputs()
    begun = begin(config.resolved(), inputs, None, tell)
    tests = RunTests(begun.config, begun.task, begun.held_out, begun.predictor, inputs)
    for encoded in tests.encoded:
        check_tokens(begun.loaded.model, encoded)
    with TemporaryDirectory() as folder:
        trainer = build_trainer(
            begun.config, begun.task, begun.train, begun.loaded, Path(folder), progress=False
        )
        if begun.config.budget is not None:
            check_budget(Budget.parse(begun.config.budget), trainer.count_costs(), trainer.always)
        return understanding(begun, tests, trainer)
