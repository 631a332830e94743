"""The trainer of a run, and the choice of its checkpoint by the held-out training examples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from childtuning.errors import ConfigError
from childtuning.runs.config import RunConfig
from childtuning.runs.evaluate import RunTests
from childtuning.runs.folder import CHECKPOINTS
from childtuning.runs.inputs import prepare_run_model
from childtuning.runs.log import RunLog, trackers
from childtuning.tasks import LengthBucketBatches, Task
from childtuning.tasks.class_weights import BalancedLoss
from childtuning.tasks.metrics import lower_is_better
from childtuning.training import ChildTrainer, LoadedModel, ScoreFn
from childtuning.training.sharing import shard


class _RunTrainer(ChildTrainer):
    """A ``ChildTrainer`` that evaluates with the run's metrics on its held-out examples."""

    draws_new_parameters = True

    def __init__(self, *args: Any, tests: RunTests | None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._tests = tests

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """Measure the model as it is, and tell the callbacks."""
        assert self._tests is not None
        found = {f"eval_{name}": value for name, value in self._tests.held_out_scores(self.model).items()}
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found


class EarlyStopping(TrainerCallback):
    """Stop after ``patience`` evaluations in a row that are not better than the best before them.

    Unlike transformers' own, it counts in the log, which a checkpoint contains; and the step at which it stops has no
    checkpoint. So an interrupted run stops at the same step, wherever it was interrupted.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop if it is time."""
        name = f"eval_{args.metric_for_best_model}"
        values = np.array([line[name] for line in state.log_history if name in line])
        sign = 1 if args.greater_is_better else -1
        best = int(np.argmax(np.where(np.isnan(values), -np.inf, sign * values)))
        if len(values) - 1 - best >= self._patience:
            control.should_training_stop = True
            control.should_save = False


def _choosing(config: RunConfig, metric: str) -> dict[str, Any]:
    """Return the training arguments with which the best checkpoint is kept."""
    return {
        "eval_strategy": "epoch" if config.save_steps is None else "steps",
        "eval_steps": config.save_steps,
        "load_best_model_at_end": True,
        "metric_for_best_model": metric,
        "greater_is_better": not lower_is_better(metric),
    }


def build_trainer(
    config: RunConfig,
    task: Task,
    encoded: Any,
    loaded: LoadedModel,
    folder: Path,
    *,
    progress: bool,
    scores: ScoreFn | None = None,
    tests: RunTests | None = None,
) -> ChildTrainer:
    """Return the trainer of a run whose learning rate and epochs are numbers, ready to start.

    Args:
        config, task, encoded, loaded, folder: the run, its examples, the training ones encoded, its model, its folder.
        progress: draw a bar on standard error.
        scores: as for ``ChildTrainer``.
        tests: its evaluation sets; without them, no checkpoint is chosen.
    """
    assert isinstance(config.epochs, float)
    chooses = config.chooses_checkpoint and tests is not None
    num_steps = int(len(encoded) * config.epochs / (config.batch_size * config.gradient_accumulation))
    arguments = TrainingArguments(
        output_dir=str(folder / CHECKPOINTS),
        **config.arguments(),
        lr_scheduler_type="linear",
        bf16=config.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        save_strategy="epoch" if config.save_steps is None else "steps",
        save_steps=config.save_steps or 500,
        save_total_limit=2,
        **(_choosing(config, task.metrics[0]) if chooses else {}),
        logging_steps=max(1, min(10, num_steps // 20)),  # about twenty points even in a short run
        logging_nan_inf_filter=False,  # it would log 0 for a non-finite loss
        disable_tqdm=not progress,
        report_to="none",
        run_name=folder.name,
        dataloader_pin_memory=False,
    )
    callbacks = [RunLog(folder / "log.jsonl"), *trackers(config.report_to or (), folder)]
    if chooses and config.early_stopping is not None:
        callbacks.append(EarlyStopping(config.early_stopping))
    methods = config.methods()
    prepared = prepare_run_model(config, methods, loaded)
    if config.shard:
        shard(prepared.model)
    child = replace(config.child(), always=None)  # prepared.always includes it
    if prepared.eligible is not None:
        child = replace(child, eligible=prepared.eligible)
    trainer = _RunTrainer(
        prepared.model,
        arguments,
        tests=tests,
        train_dataset=encoded,
        eval_dataset=tests.encoded[1] if tests is not None and chooses else None,
        data_collator=task.rules.collator(loaded.processor, exact=methods.num_positions > 0),
        child=child,
        always=prepared.always,
        scores=scores,
        methods=methods.methods,
        train_batches=LengthBucketBatches(encoded.lengths, config.batch_size, seed=config.seed),
        base_name=loaded.name,
        compute_loss_func=_class_loss(config, task),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _class_loss(config: RunConfig, task: Task) -> BalancedLoss | None:
    """Return the loss with class weights; ``None`` if the model's own is trained.

    Raises:
        ConfigError: when an example does not have one class.
    """
    if config.class_weights is None:
        return None
    truth = task.rules.truth(task.train, task.label_names)
    if truth is None:
        raise ConfigError(f"class_weights needs one class per example, got {task.kind}. Leave it out.")
    return BalancedLoss(truth, len(task.label_names))
