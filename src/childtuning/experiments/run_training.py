"""Execute one run: load, choose the child, train, measure, and leave a folder behind."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from childtuning.child import Child
from childtuning.child.eligible import matches
from childtuning.experiments.peak_memory import peak_memory_bytes, reset_peak_memory
from childtuning.experiments.prediction import Reader
from childtuning.experiments.run_config import RunConfig
from childtuning.experiments.run_files import (
    CHECKPOINTS,
    CONFIG,
    LABELS,
    METHOD_FILES,
    METRICS,
    START,
    check_output,
    clear_run,
    last_checkpoint,
    remove_empty,
    write_json,
    write_text,
)
from childtuning.experiments.run_folder import RunFolder
from childtuning.experiments.run_inputs import prepare_run_model
from childtuning.experiments.run_result import RunResult
from childtuning.experiments.run_start import apply_start
from childtuning.experiments.run_tests import RunTests
from childtuning.experiments.shared_inputs import Inputs
from childtuning.optim.processes import is_main_process, wait_for_all
from childtuning.tasks import Kind, LengthBucketBatches, Task
from childtuning.training import ChildTrainer, LoadedModel, ScoreFn

Tell = Callable[[str], None]


def build_trainer(
    config: RunConfig,
    kind: Kind,
    encoded: Any,
    loaded: LoadedModel,
    folder: Path,
    *,
    progress: bool,
    scores: ScoreFn | None = None,
) -> ChildTrainer:
    """Return the trainer of a run, ready to be started."""
    from transformers import TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    from childtuning.experiments.run_log import RunLog, trackers

    num_steps = int(len(encoded) * config.epochs / (config.batch_size * config.gradient_accumulation))
    arguments = TrainingArguments(
        output_dir=str(folder / CHECKPOINTS),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=config.precision == "bf16",
        torch_compile=config.compile,
        use_cpu=not torch.cuda.is_available(),
        seed=config.seed,
        save_strategy="epoch" if config.save_steps is None else "steps",
        save_steps=config.save_steps or 500,
        save_total_limit=2,
        logging_steps=max(1, min(10, num_steps // 20)),  # some twenty points also of a short run
        disable_tqdm=not progress,
        report_to="none",
        run_name=folder.name,
        dataloader_pin_memory=False,
    )
    methods = config.methods()
    prepared = prepare_run_model(config, methods, loaded)
    child = replace(config.child(), always=None)  # it is in what was prepared
    if prepared.eligible is not None:
        child = replace(child, eligible=prepared.eligible)
    trainer = ChildTrainer(
        prepared.model,
        arguments,
        train_dataset=encoded,
        data_collator=kind.collator(loaded.processor),
        child=child,
        always=prepared.always,
        scores=scores,
        methods=methods.methods,
        train_batches=LengthBucketBatches(encoded.lengths, config.batch_size, seed=config.seed),
        base_name=loaded.name,
        callbacks=[RunLog(folder / "log.jsonl"), *trackers(config.report_to or (), folder)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train_run(
    config: RunConfig,
    output: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = False,
    tell: Tell = lambda line: None,
    inputs: Inputs | None = None,
) -> RunResult:
    """Execute a run and leave its folder behind.

    Everything that can be wrong with the input is found before anything is written. Of several processes, rank 0
    writes the folder and tells. A run that was stopped at any
    moment goes on with ``resume`` and ends bitwise as it would have.

    Args:
        config: the options.
        output: the run's folder; new or empty, unless ``overwrite`` (an earlier run's) or ``resume``.
        progress: draw bars on standard error.
        tell: called with lines for the user.
        inputs: where data, model and scores come from; by default they are made for this run alone.
    Returns:
        the result, as it also stands in ``metrics.json``.
    Raises:
        ConfigError, DataError, ModelError, ParameterError: see there.
    """
    import transformers

    config = config.resolved()
    is_main = is_main_process()
    tell = tell if is_main else lambda line: None
    inputs = inputs or Inputs()
    folder = Path(output).expanduser()
    check_output(folder, config, overwrite=overwrite, resume=resume)
    if resume and (folder / METRICS).is_file():
        tell("the run is finished already; this is its result")
        return RunResult(**RunFolder(folder).metrics)
    task, held_out = inputs.task(config)
    if task.num_empty:
        tell(f"{task.num_empty} rows have empty text; they are kept")
    loaded = inputs.model(config, task)
    beginning = apply_start(config, loaded, folder if resume else None)
    reader = Reader(task.how, loaded.processor, task.label_names, config.max_length, tell=tell)
    train = inputs.encoded(config, reader, task.train, "the training examples")
    tests = RunTests(config, task, held_out, reader, inputs)
    reset_peak_memory()
    labels = _labels(task, loaded)
    trainer = build_trainer(
        config, task.how, train, loaded, folder, progress=progress, scores=inputs.scores(config)
    )
    checkpoint = last_checkpoint(folder) if resume else None
    transformers.set_seed(config.seed)
    start = time.perf_counter()
    if checkpoint is None:
        try:
            tell(_describe(trainer.select()))
        except BaseException:
            if is_main:
                remove_empty(folder)
            raise
    fisher_seconds = time.perf_counter() - start
    if is_main:
        if overwrite:
            clear_run(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if beginning is not None and checkpoint is None:
            beginning.save(folder / START)
        write_text(folder / CONFIG, config.to_toml())
    wait_for_all()
    if checkpoint is not None:
        tell(f"going on from {checkpoint.name}")
    start = time.perf_counter()
    transformers.set_seed(config.seed)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    train_seconds = time.perf_counter() - start
    facts = {
        "fisher_seconds": fisher_seconds,
        "train_seconds": train_seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "train_examples": len(train),
        "empty_texts": task.num_empty,
        "cut_by_length": train.num_cut + tests.num_cut,
        **tests.measure(trainer.model),
    }
    if is_main:
        _save(config, task.how, loaded, labels, trainer, folder)
    wait_for_all()  # the delta is there, and nobody writes a checkpoint any more
    result = _result(config, task, trainer, folder, facts)
    if is_main:
        write_json(folder / METRICS, result.to_dict())
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return result


def _save(
    config: RunConfig,
    kind: Kind,
    loaded: LoadedModel,
    labels: dict[str, Any],
    trainer: ChildTrainer,
    folder: Path,
) -> None:
    """Write everything by which the trained model is had again."""
    child = trainer.select()
    trainer.delta().save(folder)
    if isinstance(child, Child):
        child.save(folder / "child.safetensors")
    loaded.processor.save_pretrained(folder / kind.processor_folder)
    config.methods().save(trainer.bare_model, folder / METHOD_FILES)
    write_json(folder / LABELS, labels)


def _result(
    config: RunConfig,
    task: Task,
    trainer: ChildTrainer,
    folder: Path,
    facts: dict[str, Any],
) -> RunResult:
    child, delta = trainer.select(), trainer.delta()
    if isinstance(child, Child):
        child_parameters, eligible_parameters = child.num_trained, child.num_eligible
    else:
        beside = sum(part.num_trained for name, part in delta.parts.items() if matches(name, child.always))
        child_parameters = eligible_parameters = delta.num_trained - beside
    return RunResult(
        task=task.name,
        method=config.method,
        seed=config.seed,
        metric={"name": task.metrics[0], "value": facts["metrics"][task.metrics[0]]},
        density=child.density,
        trained_parameters=delta.num_trained,
        child_parameters=child_parameters,
        eligible_parameters=eligible_parameters,
        state_bytes=trainer.child_optimizer.num_state_bytes,
        delta_bytes=sum((folder / name).stat().st_size for name in ("delta.json", "delta.safetensors")),
        **facts,
        output=str(folder),
    )


def _labels(task: Task, loaded: LoadedModel) -> dict[str, Any]:
    columns = task.columns
    return {
        "kind": task.kind,
        "label_names": list(task.label_names),
        "metrics": list(task.metrics),
        "columns": {"text": columns.text, "text_pair": columns.text_pair, "label": columns.label},
        "form": task.train.form,
        "base_name": loaded.name,
        "base_hash": loaded.base_hash,
        "new_parameters": list(loaded.new_parameters),
    }


def _describe(child: Any) -> str:
    if isinstance(child, Child):
        return (
            f"the child trains {child.num_trained:,} of {child.num_eligible:,} entries ({child.density:.1%})"
        )
    return f"each step trains a fresh random {child.density:.1%} of the entries"
