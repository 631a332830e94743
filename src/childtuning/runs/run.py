"""Execute one run: load, choose the child, train, evaluate, and save the run's folder."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from childtuning.child import Budget, Child
from childtuning.child.eligible import matches
from childtuning.child.pieces import local_of
from childtuning.delta import Delta
from childtuning.errors import LostProcessError
from childtuning.ranks import Ranks, is_lost_process, is_main_process, num_processes, wait_for_all
from childtuning.runs.begin import Tell, begin, understanding
from childtuning.runs.config import RunConfig
from childtuning.runs.evaluate import RunTests, check_tokens
from childtuning.runs.folder import (
    CHECKPOINTS,
    CHOSEN,
    CONFIG,
    DATA,
    FOLDS,
    LABELS,
    METHOD_FILES,
    METRICS,
    START,
    RunFolder,
    RunResult,
    alone_in,
    as_begun,
    check_output,
    chosen_before,
    clear_run,
    data_hashes,
    last_checkpoint,
    remove_empty,
    write_json,
    write_text,
)
from childtuning.runs.folds import check_folds, train_folds
from childtuning.runs.inputs import Inputs
from childtuning.runs.log import ProgressLines, peak_memory_bytes, reset_peak_memory
from childtuning.runs.temperature import output_layer, scale
from childtuning.runs.trainer import build_trainer
from childtuning.tasks import Kind, Task
from childtuning.training import (
    ChildTrainer,
    LoadedModel,
    saves_computation,
)


def _diverged_at(trainer: ChildTrainer) -> int | None:
    """Return the step at which a loss was not finite, or the last one if a weight is not."""
    for line in trainer.state.log_history:
        if not math.isfinite(line.get("loss", 0.0)):
            return line["step"]
    trained = (local_of(p) for p in trainer.bare_model.parameters() if p.is_floating_point())
    is_lost = torch.tensor(int(not all(bool(p.isfinite().all()) for p in trained)), device="cpu")
    return trainer.state.global_step if bool(Ranks.everyone().max_(is_lost)) else None


def train_run(
    config: RunConfig,
    output: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = False,
    tell: Tell = lambda line: None,
    inputs: Inputs | None = None,
    base_hash: str | None = None,
) -> RunResult:
    """Execute a run and save its folder.

    All input is checked before anything is written. With several processes, only rank 0 writes the folder and calls
    ``tell``. A run that was interrupted at any moment continues with ``resume``; its result is bitwise the same.

    Args:
        config: the options.
        output: the run's folder; new or empty, unless ``overwrite`` (an earlier run's) or ``resume``.
        progress: draw bars on standard error; otherwise ``tell`` gets a line every ten seconds.
        tell: called with lines for the user.
        inputs: loads data, model and scores; by default, without caching.
        base_hash: what the base model's weights must hash to, see ``RunResult``; ``None``: anything.
    Returns:
        the result, also saved in ``metrics.json``.
    Raises:
        ConfigError, DataError, ModelError, ParameterError: for faulty options, data, model or patterns.
        BaseMismatchError: when the base model is another one, or has changed since a run that is resumed began.
    """
    folder, inputs = Path(output).expanduser(), inputs or Inputs()
    with alone_in(folder) if is_main_process() else nullcontext():
        return _train_run(
            config.resolved(),
            folder,
            inputs,
            overwrite=overwrite,
            resume=resume,
            progress=progress,
            tell=tell,
            base_hash=base_hash,
        )


def _train_run(
    config: RunConfig,
    folder: Path,
    inputs: Inputs,
    *,
    overwrite: bool,
    resume: bool,
    progress: bool,
    tell: Tell,
    base_hash: str | None,
) -> RunResult:
    import transformers

    is_main = is_main_process()
    tell = tell if is_main else lambda line: None
    is_asked, resume = resume, check_output(folder, config, overwrite=overwrite, resume=resume)
    if resume:
        config = as_begun(folder, config)
    elif is_asked:
        tell("the run was stopped before it had chosen its child; it starts again")
    if resume and (folder / METRICS).is_file():
        tell("the run is already finished; this is its result")
        return RunResult(**RunFolder(folder).metrics)
    has_folds = config.folds is not None and config.fold is None
    if has_folds:
        check_folds(config, inputs, tell)
    before = chosen_before(folder) if resume else {}
    begun = begin(config, inputs, folder if resume else None, tell, base_hash or before.get("base_hash"))
    config, task, loaded, train = begun.config, begun.task, begun.loaded, begun.train
    tests = RunTests(config, task, begun.held_out, begun.predictor, inputs)
    for encoded in tests.encoded:
        check_tokens(loaded.model, encoded)
    reset_peak_memory()
    labels = _labels(task, loaded)
    trainer = build_trainer(
        config, task, train, loaded, folder, progress=progress, scores=inputs.scores(config), tests=tests
    )
    found = understanding(begun, tests, trainer)
    for line in () if resume else found.lines():
        tell(line)
    if config.shard and num_processes() == 1:
        tell("one process holds the whole model: --shard is for several, started by torchrun")
    if not progress:
        trainer.add_callback(ProgressLines(tell))
    checkpoint = last_checkpoint(folder) if resume else None
    transformers.set_seed(config.seed)
    start = time.perf_counter()
    try:
        scaled = output_layer(trainer.bare_model, trainer.always, tests) if config.temperature_scaling else []
        if checkpoint is None:
            tell(_describe(trainer.select(), trainer.num_scored, len(train)))
        budget = _budget(config, trainer, tell) if checkpoint is None else None
        chosen = {"fisher_seconds": time.perf_counter() - start + inputs.spared_seconds, "budget": budget}
        chosen |= {key: before[key] for key in chosen if checkpoint is not None and key in before}
        chosen["base_hash"] = loaded.base_hash
    except BaseException:
        if is_main:
            remove_empty(folder)
        raise
    if is_main:
        if not resume:  # once more: a run on another machine may have been faster
            check_output(folder, config, overwrite=overwrite, resume=False)
        if overwrite:
            clear_run(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / CONFIG, config.to_toml())  # first, so that whatever follows can be resumed
        if begun.start is not None and checkpoint is None:
            begun.start.save(folder / START)
        write_json(folder / DATA, data_hashes(asdict(config)))
        (folder / CHECKPOINTS).mkdir(exist_ok=True)
        write_json(folder / CHECKPOINTS / CHOSEN, chosen)
    wait_for_all()
    folds = None
    if has_folds:

        def train_fold(fold: RunConfig, place: Path) -> RunResult:
            return train_run(fold, place, resume=(place / CONFIG).is_file(), progress=progress, inputs=inputs)

        folds = train_folds(config, folder / FOLDS, inputs, train_fold, tell)
        reset_peak_memory()
    if checkpoint is not None:
        tell(f"continuing from {checkpoint.name}")
    start = time.perf_counter()
    transformers.set_seed(config.seed)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except RuntimeError as fault:
        if not is_lost_process(fault):
            raise
        whole = last_checkpoint(folder)
        remedy = f"Go on from {whole} with --resume." if whole else "There is no checkpoint yet. Start again."
        raise LostProcessError(
            f"rank {Ranks.everyone().rank}: another process has ended. {remedy}"
        ) from fault
    train_seconds = time.perf_counter() - start
    diverged_at = _diverged_at(trainer)
    temperature = None
    if scaled and diverged_at is None:
        temperature = scale(trainer.bare_model, scaled, tests, tell)
    facts = {
        **chosen,
        "train_seconds": train_seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "train_examples": len(train),
        "empty_texts": task.num_empty,
        "notes": list(task.notes),
        "cut_by_length": train.num_cut + tests.num_cut,
        "diverged_at": diverged_at,
        "understood": found.to_dict(),
        "checkpoint": _checkpoint(trainer, task),
        "temperature": temperature,
        **(tests.measure(trainer.model, folds) if diverged_at is None else tests.nothing()),
    }
    delta = trainer.delta()  # of a sharded model every process gathers it
    if is_main:
        delta.save(folder)
        _save(config, task.rules, loaded, labels, trainer, folder)
    wait_for_all()  # the delta is saved, and no process writes checkpoints any more
    result = _result(config, task, trainer, delta, folder, facts)
    if is_main:
        write_json(folder / METRICS, result.to_dict())
        for name in (CHECKPOINTS, FOLDS):
            shutil.rmtree(folder / name, ignore_errors=True)
    return result


def _checkpoint(trainer: ChildTrainer, task: Task) -> dict[str, float] | None:
    """Return which checkpoint was kept, if the held-out examples chose one."""
    state = trainer.state
    if state.best_model_checkpoint is None or state.best_global_step is None:
        return None
    return {"step": state.best_global_step, "of": state.global_step, task.metrics[0]: state.best_metric}  # type: ignore[dict-item]


def _save(
    config: RunConfig,
    kind: Kind,
    loaded: LoadedModel,
    labels: dict[str, Any],
    trainer: ChildTrainer,
    folder: Path,
) -> None:
    """Save what is needed beside the delta to restore the trained model."""
    child = trainer.select()
    if isinstance(child, Child):
        child.save(folder / "child.safetensors")
    loaded.processor.save_pretrained(folder / kind.processor_folder)
    if not (folder / START).is_dir():  # other libraries know nothing of a start
        config.methods().save(trainer.bare_model, folder / METHOD_FILES)
    write_json(folder / LABELS, labels)


def _result(
    config: RunConfig,
    task: Task,
    trainer: ChildTrainer,
    delta: Delta,
    folder: Path,
    facts: dict[str, Any],
) -> RunResult:
    child = trainer.select()
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
        learning_rate=config.learning_rate,  # type: ignore[arg-type]
        epochs=config.epochs,  # type: ignore[arg-type]
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
        "columns": {
            "text": columns.text,
            "text_pair": columns.text_pair,
            "label": columns.label,
            **({"decimal_commas": True} if columns.decimal_commas else {}),
            **({"pixel_range": columns.pixel_range} if columns.pixel_range else {}),
        },
        "form": task.train.form,
        "base_name": loaded.name,
        "base_hash": loaded.base_hash,
        "new_parameters": list(loaded.new_parameters),
    }


_COSTS = {"step": "step time", "memory": "peak memory", "state": "optimizer state", "delta": "delta"}


def _budget(
    config: RunConfig, trainer: ChildTrainer, tell: Callable[[str], None]
) -> dict[str, str | float] | None:
    """Say what the child that fits a budget is predicted to cost, and for a step what it is measured to cost."""
    if config.budget is None:
        return None
    child, costs = trainer.select(), trainer.count_costs()
    assert isinstance(child, Child)
    shares = costs.shares(child)
    found: dict[str, str | float] = {"limit": config.budget} | shares
    kind = Budget.parse(config.budget).kind
    line = f"budget {config.budget}: {shares[kind]:.3f} of full fine-tuning's {_COSTS[kind]} predicted"
    if kind == "memory":
        line += f", {costs.full(kind) * shares[kind] / 1e9:.2f} GB"
    is_plain = config.precision == "fp32" and len(config.methods().methods) == 1 and num_processes() == 1
    if kind == "step" and is_plain:
        found["measured_passes"] = trainer.measure_passes()
        line += f"; forward and backward measured: {found['measured_passes']:.3f}"
    tell(line)
    if kind in ("step", "memory") and config.granularity == "element":
        tell("single entries need whole gradients; --granularity column trains more within this budget")
    elif kind in ("step", "memory") and saves_computation(child):
        trainer.create_optimizer()
        is_partial = any(not (part.is_whole or part.is_empty) for part in child.parts.values())
        if is_partial and not trainer.child_optimizer.structured:
            tell(
                "the prediction is for layers that form the child's gradients alone; here they form whole ones "
                "(--keep-gradients, a method that reads them), which costs more"
            )
    return found


def _describe(child: Any, num_scored: int | None, num_examples: int) -> str:
    if isinstance(child, Child):
        chosen = "" if num_scored in (None, num_examples) else f", chosen by {num_scored:,} examples"
        return f"the child trains {child.num_trained:,} of {child.num_eligible:,} entries ({child.density:.1%}){chosen}"
    return f"each step trains a fresh random {child.density:.1%} of the entries"
