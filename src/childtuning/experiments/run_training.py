"""Execute one run: load, choose the child, train, measure, and leave a folder behind."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from childtuning.child import Child
from childtuning.experiments.peak_memory import peak_memory_bytes, reset_peak_memory
from childtuning.experiments.prediction import label_ids, predict_logits, score_logits
from childtuning.experiments.run_config import RunConfig
from childtuning.experiments.run_folder import (
    CHECKPOINTS,
    CONFIG,
    LABELS,
    METHOD_FILES,
    METRICS,
    TOKENIZER,
    RunFolder,
    check_output,
    clear_run,
    remove_empty,
    write_json,
    write_text,
)
from childtuning.methods import Combination
from childtuning.patterns import matches
from childtuning.tasks import (
    LengthBucketBatches,
    PaddingCollator,
    Task,
    encode,
    guess_columns,
    load_task,
    read_rows,
)
from childtuning.tasks import task_from_files as read_task
from childtuning.tasks.rows import columns_of
from childtuning.training import ChildTrainer, LoadedModel, Prepared, load_classifier

Tell = Callable[[str], None]


@dataclass(frozen=True)
class RunResult:
    """What a run reports.

    Attributes:
        task, method, seed: as configured.
        metric: name and value of the task's main metric on the dev split.
        metrics: all of the task's metrics.
        density: the share of the eligible entries in the child.
        trained_parameters: entries that were trained, the new head included.
        child_parameters: those of them that are eligible.
        eligible_parameters: entries that the selection could choose from.
        state_bytes: the optimizer's memory beside the model and its gradients.
        delta_bytes: size of the delta's two files.
        fisher_seconds, train_seconds: wall time of the scores and of training.
        peak_memory_bytes: of the GPU where there is one, else of the process, during choice and training.
        train_examples, eval_examples, empty_texts: counts.
        output: the run's folder.
    """

    task: str
    method: str
    seed: int
    metric: dict[str, Any]
    metrics: dict[str, float]
    density: float
    trained_parameters: int
    child_parameters: int
    eligible_parameters: int
    state_bytes: int
    delta_bytes: int
    fisher_seconds: float
    train_seconds: float
    peak_memory_bytes: int
    train_examples: int
    eval_examples: int
    empty_texts: int
    output: str

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready fields."""
        return asdict(self)


def read_run_task(config: RunConfig) -> Task:
    """Load the examples that a run trains on and is measured on."""
    if config.task is not None:
        return load_task(
            config.task, data_dir=config.data_dir, train_limit=config.train_limit, seed=config.data_seed
        )
    assert config.train is not None and config.eval is not None
    return read_task(
        config.train,
        config.eval,
        text=config.text,
        text_pair=config.text_pair,
        label=config.label,
        label_type=config.label_type,  # type: ignore[arg-type]
        train_limit=config.train_limit,
        seed=config.data_seed,
    )


def load_run_model(config: RunConfig, task: Task) -> LoadedModel:
    """Load the base model with a head for the task."""
    return load_classifier(
        config.model,
        num_labels=task.num_labels,
        label_names=task.label_names,
        regression=task.kind == "regression",
        seed=config.seed,
    )


def prepare_run_model(config: RunConfig, methods: Combination, loaded: LoadedModel) -> Prepared:
    """Let the methods change the loaded model, under the run's seed."""
    import transformers

    transformers.set_seed(config.seed)
    return methods.prepare(loaded.model, loaded.new_parameters)


def build_trainer(
    config: RunConfig, task: Task, loaded: LoadedModel, folder: Path, *, progress: bool
) -> ChildTrainer:
    """Return the trainer of a run, ready to be started."""
    from transformers import TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    from childtuning.experiments.run_log import RunLog

    encoded = encode(loaded.tokenizer, task.train, max_length=config.max_length, label_ids=task.label_ids)
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
        use_cpu=not torch.cuda.is_available(),
        seed=config.seed,
        save_strategy="epoch" if config.save_steps is None else "steps",
        save_steps=config.save_steps or 500,
        save_total_limit=2,
        logging_steps=10,
        disable_tqdm=not progress,
        report_to="none",
        dataloader_pin_memory=False,
    )
    methods = config.methods()
    prepared = prepare_run_model(config, methods, loaded)
    child = config.child()
    if prepared.eligible is not None:
        child = replace(child, eligible=prepared.eligible)
    trainer = ChildTrainer(
        prepared.model,
        arguments,
        train_dataset=encoded,
        data_collator=PaddingCollator(loaded.tokenizer),
        child=child,
        always=prepared.always,
        methods=methods.methods,
        train_batches=LengthBucketBatches(encoded.lengths, config.batch_size, seed=config.seed),
        base_name=loaded.name,
        callbacks=[RunLog(folder / "log.jsonl")],
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
) -> RunResult:
    """Execute a run and leave its folder behind.

    Everything that can be wrong with the input is found before anything is written. A run that was stopped at any
    moment goes on with ``resume`` and ends bitwise as it would have.

    Args:
        config: the options.
        output: the run's folder; new or empty, unless ``overwrite`` (an earlier run's) or ``resume``.
        progress: draw bars on standard error.
        tell: called with lines for the user.
    Returns:
        the result, as it also stands in ``metrics.json``.
    Raises:
        ConfigError, DataError, ModelError, ParameterError: see there.
    """
    import transformers

    config = config.resolved()
    folder = Path(output).expanduser()
    check_output(folder, config, overwrite=overwrite, resume=resume)
    if resume and (folder / METRICS).is_file():
        tell("the run is finished already; this is its result")
        return RunResult(**RunFolder(folder).metrics)
    task = read_run_task(config)
    if task.num_empty:
        tell(f"{task.num_empty} rows have empty text; they are kept")
    loaded = load_run_model(config, task)
    reset_peak_memory()
    labels = _labels(config, task, loaded)
    trainer = build_trainer(config, task, loaded, folder, progress=progress)
    checkpoint = _last_checkpoint(folder) if resume else None
    transformers.set_seed(config.seed)
    start = time.perf_counter()
    if checkpoint is None:
        try:
            tell(_describe(trainer.select()))
        except BaseException:
            remove_empty(folder)
            raise
    fisher_seconds = time.perf_counter() - start
    if overwrite:
        clear_run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG, config.to_toml())
    if checkpoint is not None:
        tell(f"going on from {checkpoint.name}")
    start = time.perf_counter()
    transformers.set_seed(config.seed)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    train_seconds = time.perf_counter() - start
    peak = peak_memory_bytes()
    return _finish(config, task, loaded, labels, trainer, folder, fisher_seconds, train_seconds, peak)


def _finish(
    config: RunConfig,
    task: Task,
    loaded: LoadedModel,
    labels: dict[str, Any],
    trainer: ChildTrainer,
    folder: Path,
    fisher_seconds: float,
    train_seconds: float,
    peak: int,
) -> RunResult:
    logits = predict_logits(trainer.model, loaded.tokenizer, task.dev, max_length=config.max_length)
    metrics = score_logits(task.kind, task.metrics, logits, label_ids(task, task.dev))
    delta, child = trainer.delta(), trainer.select()
    delta.save(folder)
    if isinstance(child, Child):
        child.save(folder / "child.safetensors")
    loaded.tokenizer.save_pretrained(folder / TOKENIZER)
    config.methods().save(trainer.bare_model, folder / METHOD_FILES)
    write_json(folder / LABELS, labels)
    if isinstance(child, Child):
        child_parameters, eligible_parameters = child.num_trained, child.num_eligible
    else:
        beside = sum(part.num_trained for name, part in delta.parts.items() if matches(name, child.always))
        child_parameters = eligible_parameters = delta.num_trained - beside
    result = RunResult(
        task=task.name,
        method=config.method,
        seed=config.seed,
        metric={"name": task.metrics[0], "value": metrics[task.metrics[0]]},
        metrics=metrics,
        density=child.density,
        trained_parameters=delta.num_trained,
        child_parameters=child_parameters,
        eligible_parameters=eligible_parameters,
        state_bytes=trainer.child_optimizer.num_state_bytes,
        delta_bytes=sum((folder / name).stat().st_size for name in ("delta.json", "delta.safetensors")),
        fisher_seconds=fisher_seconds,
        train_seconds=train_seconds,
        peak_memory_bytes=peak,
        train_examples=len(task.train),
        eval_examples=len(task.dev),
        empty_texts=task.num_empty,
        output=str(folder),
    )
    write_json(folder / METRICS, result.to_dict())
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return result


def _labels(config: RunConfig, task: Task, loaded: LoadedModel) -> dict[str, Any]:
    columns: dict[str, Any] = {"text": None, "text_pair": None, "label": "label"}
    if config.train is not None:
        text, text_pair = config.text, config.text_pair
        if text is None:
            text, guessed = guess_columns(columns_of(read_rows(config.train)))
            text_pair = text_pair or guessed
        columns = {"text": text, "text_pair": text_pair, "label": config.label}
    return {
        "kind": task.kind,
        "label_names": list(task.label_names),
        "metrics": list(task.metrics),
        "columns": columns,
        "pairs": task.train.text_pair is not None,
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


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; broken ones are left where they are."""
    found = sorted(
        (folder / CHECKPOINTS).glob("checkpoint-*[0-9]"), key=lambda path: int(path.name.split("-")[1])
    )
    whole = [path for path in found if _is_json(path / "trainer_state.json")]
    return whole[-1] if whole else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
