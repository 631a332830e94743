"""Execute one run: load, choose the child, train, measure, and leave a folder behind."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from childtuning.child import Child
from childtuning.child.eligible import matches
from childtuning.errors import ConfigError, did_you_mean
from childtuning.optim.processes import is_main_process, wait_for_all
from childtuning.runs.config import RunConfig
from childtuning.runs.evaluate import Predictor, RunTests
from childtuning.runs.folder import (
    CHECKPOINTS,
    CONFIG,
    LABELS,
    METHOD_FILES,
    METRICS,
    START,
    TENSORBOARD,
    RunFolder,
    RunResult,
    check_output,
    clear_run,
    last_checkpoint,
    remove_empty,
    write_json,
    write_text,
)
from childtuning.runs.inputs import Inputs, apply_start, load_run_model, prepare_run_model, read_run_task
from childtuning.tasks import Kind, LengthBucketBatches, Task
from childtuning.training import (
    ChildTrainer,
    LoadedModel,
    ScoreFn,
    choose_child,
    fisher_sample,
    fisher_scores,
)

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
    predictor = Predictor(task.rules, loaded.processor, task.label_names, config.max_length, tell=tell)
    train = inputs.encoded(config, predictor.encode, task.train, "the training examples")
    tests = RunTests(config, task, held_out, predictor, inputs)
    reset_peak_memory()
    labels = _labels(task, loaded)
    trainer = build_trainer(
        config, task.rules, train, loaded, folder, progress=progress, scores=inputs.scores(config)
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
        _save(config, task.rules, loaded, labels, trainer, folder)
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


class RunLog(TrainerCallback):
    """Append every log of the trainer to a file.

    Args:
        path: the file; its folder exists once training starts.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Drop what a run that was stopped had logged after the checkpoint it now goes on from."""
        if state.is_world_process_zero and self._path.is_file():
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [
                line
                for line in lines
                if line.endswith("\n") and json.loads(line)["step"] <= state.global_step
            ]
            self._path.write_text("".join(kept if state.global_step else []), encoding="utf-8")

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Write one line."""
        if state.is_world_process_zero and logs:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def trackers(names: Sequence[str], folder: Path) -> list[TrainerCallback]:
    """Return what logs to TensorBoard and its like while training; TensorBoard's files are the run's own.

    Args:
        names: as the Trainer's ``report_to`` takes them.
        folder: the run's.
    Raises:
        ConfigError: the Trainer does not know one of them, or it is not installed.
    """
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    found: list[TrainerCallback] = []
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = sorted(INTEGRATION_TO_CALLBACK)
            raise ConfigError(f"report_to knows no {name!r}. {did_you_mean(name, known)}")
        try:
            callback = INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError) as fault:
            reason = " ".join(str(fault).split())
            raise ConfigError(
                f"report_to {name!r} is not installed ({reason}) Install it, or leave it out."
            ) from None
        if name == "tensorboard":
            callback.logging_dir = str(folder / TENSORBOARD)
        found.append(callback)
    return found


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_memory() -> None:
    """Start counting anew; where the system cannot, the peak stays that of the whole process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def peak_memory_bytes() -> int:
    """Return the peak since ``reset_peak_memory``, in bytes; 0 where the system does not tell."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        if sys.platform == "win32":
            return 0
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def score_run(
    config: RunConfig,
    output: Path,
    *,
    progress: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Estimate Fisher information on a run's training set and write it to a safetensors file.

    Args:
        config: a run's options; those of training are not used.
        output: the file.
        progress: count examples on standard error.
        tell: called with lines for the user.
    Returns:
        JSON-ready: the file, counts, and by parameter its mean score and its share in a child of the run's density.
    """
    from torch.utils.data import DataLoader

    config = replace(config.resolved(), method="child-d", density=config.density)
    child_config = config.child()
    task, _ = read_run_task(config)
    loaded = load_run_model(config, task.rules, task.label_names)
    apply_start(config, loaded)
    chosen = fisher_sample(len(task.train), child_config.fisher_examples, child_config.seed)
    predictor = Predictor(task.rules, loaded.processor, task.label_names, config.max_length, tell=tell)
    encoded = predictor.encode(task.train.subset(chosen), "the training examples")
    batches = DataLoader(
        encoded,
        batch_sampler=LengthBucketBatches(encoded.lengths, config.batch_size, seed=config.seed),
        collate_fn=task.rules.collator(loaded.processor),
    )
    always = loaded.new_parameters if child_config.always is None else child_config.always
    scores = fisher_scores(child_config, loaded.model, batches, always=always, progress=progress)
    child = choose_child(child_config, loaded.model, list, always=always, scores=scores)
    assert isinstance(child, Child)
    partial = output.with_name(output.name + ".partial")
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: score.cpu().contiguous() for name, score in scores.items()}, partial)
    os.replace(partial, output)
    tell(f"scores of {child.num_eligible:,} entries from {len(encoded)} examples in {output}")
    return {
        "output": str(output),
        "task": task.name,
        "examples": len(encoded),
        "density": child.density,
        "eligible_parameters": child.num_eligible,
        "parameters": {
            name: {
                "mean": float(score.float().mean()),
                "share": child.parts[name].num_trained / score.numel(),
            }
            for name, score in scores.items()
        },
    }
