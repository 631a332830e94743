"""The inputs of a run: its examples and its model."""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from childtuning.child import Child
from childtuning.child.eligible import match_names
from childtuning.delta import Delta
from childtuning.delta.files import bits
from childtuning.errors import BaseMismatchError, ConfigError, ModelError
from childtuning.methods import Combination
from childtuning.options import options_of
from childtuning.runs.config import Data, Model, RunConfig
from childtuning.runs.folder import CONFIG, START, RunFolder
from childtuning.tasks import Kind, Split, Task, TransferTask, load_task, load_transfer_task, task_from_files
from childtuning.tasks.labels import class_name
from childtuning.training import LoadedModel, Method, Prepared, load_model


def read_run_task(config: RunConfig) -> tuple[Task, Split | None]:
    """Load a run's training and evaluation examples, and its held-out training examples."""
    drawn: dict[str, Any] = {"kind": config.task_kind, "seed": config.data_seed, "strict": config.strict}
    if config.task is not None:
        # The docstrings task draws from a pool; others hold out before they limit, so that the held-out examples are
        # the same for every training size.
        limit = config.train_limit if config.task == "docstrings" else None
        task = load_task(config.task, data_dir=config.data_dir, train_limit=limit, **drawn)
    else:
        assert config.train is not None
        task = task_from_files(
            config.train,
            config.eval,
            text=config.text,
            text_pair=config.text_pair,
            label=config.label,
            label_type=config.label_type,  # type: ignore[arg-type]
            eval_share=config.eval_share,
            folds=config.folds,
            fold=config.fold,
            encoding=config.encoding,
            sheet=config.sheet,
            **drawn,
        )
    task = task.limit_evaluation(config.eval_limit, seed=config.data_seed)
    task, aside = task.hold_out(config.held_out, config.train_limit, seed=config.data_seed)
    return task, None if aside is None else aside.sample(config.eval_limit, seed=config.data_seed)


def load_run_model(config: RunConfig, kind: Kind, label_names: Sequence[str]) -> LoadedModel:
    """Load the base model for a kind of task.

    Raises:
        ModelError: when the model does not support this kind of task.
    """
    name = config.model
    if config.init_from is not None and is_model_folder(config.init_from):
        if name is not None:
            raise ConfigError(
                f"init_from {config.init_from!r} is a model folder, and model is {name!r}. Pass one of them."
            )
        name = config.init_from
    if name is None and not kind.takes_packaged:
        raise ModelError(f"{kind.name} has no default model, got none. Pass --model FOLDER or a hub name.")
    loaded = load_model(
        name,
        auto_model=kind.auto_model,
        auto_processor=kind.auto_processor,
        options=kind.model_options(label_names),
        processor_options=kind.processor_options,
        default_processor=kind.default_processor,
        class_name=class_name,
        seed=config.seed,
    )
    if loaded.new_parameters and not kind.has_new_head:
        raise ModelError(
            f"model {loaded.name!r} is not pretrained for {kind.name}: its checkpoint lacks "
            f"{loaded.new_parameters[0]!r}. Pass a model that has it."
        )
    return loaded


def prepare_run_model(config: RunConfig, methods: Combination, loaded: LoadedModel) -> Prepared:
    """Apply the methods' ``prepare`` to the loaded model, with the run's seed.

    The option ``always``, if given, replaces the new head.

    Raises:
        ModelError: when a method does not apply to this model.
        ParameterError: when a pattern matches no parameter.
    """
    import transformers

    always = loaded.new_parameters
    if config.always is not None:
        names = [name for name, _ in loaded.model.named_parameters()]
        matched = match_names(config.always, names)
        always = tuple(name for name in names if name in matched)
    transformers.set_seed(config.seed)
    return methods.prepare(loaded.model, always)


_T = TypeVar("_T")
Scores = dict[str, Tensor]

_DATA = tuple(name for name in options_of(Data) if name != "elsewhere")
_MODEL = tuple(options_of(Model))
# Options that scores depend on, besides the data, the model and the child's configuration.
_PASS = ("seed", "always", "batch_size", "max_length", "precision", "class_weights")
# Fields of the child's configuration that scores do not depend on, where these do not stop at a stable child.
_NOT_SCORES = ("density", "mass", "budget", "granularity", "scope", "lowest", "rescale", "release_gradients")
_KEPT = {"task": 2, "elsewhere": 16, "encoded": 24, "model": 1, "scores": 1}  # the number of entries kept


class Encoder(Protocol):
    """What turns examples into model inputs, cut at a length."""

    @property
    def max_length(self) -> int: ...

    def encode(self, split: Split, where: str) -> Any: ...


class Inputs:
    """Load the inputs of runs.

    Args:
        keep: cache inputs for the next run, so that runs with the same data or the same seed read, tokenise, load and
            score only once. Runs never change cached inputs, and caching does not affect their results.
    """

    def __init__(self, *, keep: bool = False) -> None:
        self._keep = keep
        self._kept: dict[str, OrderedDict[Any, Any]] = {sort: OrderedDict() for sort in _KEPT}
        self.spared_seconds = 0.0

    def task(self, config: RunConfig) -> tuple[Task, Split | None]:
        """Return a run's examples, and its held-out training examples."""

        def read() -> tuple[Task, Split | None]:
            task, held_out = read_run_task(config)
            return task if config.metric is None else task.measured_by(config.metric), held_out

        return self._once("task", _options(config, _DATA), read)

    def elsewhere(self, name: str, config: RunConfig, task: Task) -> TransferTask:
        """Return examples of another task."""
        drawn = {"limit": config.eval_limit, "seed": config.data_seed}
        key = (name, config.data_dir, task.label_names, *drawn.values())
        return self._once(
            "elsewhere", key, lambda: load_transfer_task(name, task.label_names, config.data_dir, **drawn)
        )

    def encoded(self, config: RunConfig, encoder: Encoder, split: Split, where: str) -> Any:
        """Return encoded examples; ``where`` names them."""
        key = (_options(config, (*_DATA, *_MODEL)), encoder.max_length, where)
        return self._once("encoded", key, lambda: encoder.encode(split, where))

    def model(self, config: RunConfig, task: Task) -> LoadedModel:
        """Return the base model with a new head; the caller may modify it."""
        key = (_options(config, (*_MODEL, "seed")), task.kind, task.label_names)
        loaded = self._once("model", key, lambda: load_run_model(config, task.rules, task.label_names))
        return replace(loaded, model=copy.deepcopy(loaded.model)) if self._keep else loaded

    def scores(self, config: RunConfig) -> Callable[[Callable[[], Scores]], Scores]:
        """Return a function that takes the Fisher pass and returns its scores, or cached ones.

        ``spared_seconds`` is then the time of the pass that made cached ones.
        """
        changed = tuple(m for m in config.methods().methods if type(m).prepare is not Method.prepare)
        child = asdict(config.child())
        if child["fisher_examples"] != "auto":
            child = {k: v for k, v in child.items() if k not in _NOT_SCORES}
        key = (_options(config, (*_DATA, *_MODEL, *_PASS)), changed, tuple(child.items()))
        self.spared_seconds = 0.0

        def take(make_fn: Callable[[], Scores]) -> Scores:
            def timed() -> tuple[Scores, float]:
                start = time.perf_counter()
                return make_fn(), time.perf_counter() - start

            start = time.perf_counter()
            scores, seconds = self._once("scores", key, timed)
            self.spared_seconds = max(0.0, seconds - (time.perf_counter() - start))
            return scores

        return take

    def _once(self, sort: str, key: Any, make_fn: Callable[[], _T]) -> _T:
        if not self._keep:
            return make_fn()
        kept = self._kept[sort]
        if key not in kept:
            while len(kept) >= _KEPT[sort]:
                kept.popitem(last=False)  # before the new one is made: both may be large
            kept[key] = make_fn()
        kept.move_to_end(key)
        return kept[key]


def _options(config: RunConfig, names: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(getattr(config, name) for name in names)


def apply_start(config: RunConfig, loaded: LoadedModel, folder: Path | None = None) -> Delta | None:
    """Set a loaded model to the values that the run starts from (``init_from``); the new head is not changed.

    Args:
        config: the run; if ``init_from`` is a model folder, it was already loaded as the model.
        loaded: the base model with a head for the task.
        folder: the folder of an interrupted run: its start is read from there, even if the other run is gone.
    Returns:
        the changes to the base model, to be saved with the run; ``None`` if it starts from the base model.
    Raises:
        ConfigError: when there is no such run, or it is not finished.
        ModelError: when its model differs from this run's.
    """
    if config.init_from is None:
        return None
    if folder is not None and (folder / START).is_dir():
        delta = Delta.load(folder / START)
        delta.apply_(loaded.model)
        return delta
    if is_model_folder(config.init_from):
        return None
    other = merged_model(RunFolder(config.init_from))
    values: dict[str, Tensor] = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    new = set(loaded.new_parameters)
    masks: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if name in new:
                continue
            value = values.get(name)
            if value is None or value.shape != parameter.shape:
                raise ModelError(
                    f"the run in {config.init_from!r} has no {name!r} of shape {list(parameter.shape)}. "
                    "Start from a run of the same base model."
                )
            masks[name] = (bits(parameter) != bits(value)).any(1).view(parameter.shape)
            parameter.copy_(value)
        for name, buffer in loaded.model.named_buffers():
            if name in values and values[name].shape == buffer.shape:
                buffer.copy_(values[name])
    return Delta.capture(loaded.model, Child.from_masks(masks), base=loaded.name)


def base_model(run: RunFolder) -> LoadedModel:
    """Return the model that a run started from, with a random head; the base model's weights are verified.

    Raises:
        ModelError: when it is gone.
        BaseMismatchError: when the base model's weights have changed since the run.
    """
    if run.config.model and Path(run.config.model).is_absolute() and not Path(run.config.model).exists():
        raise ModelError(
            f"the base model {run.config.model!r} is gone. Put it back, or open the run in Python and say where it is: "
            f"childtuning.load({str(run.path)!r}, model=FOLDER)."
        )
    starts = (run.path / START).is_dir()  # from a run, whatever lies at the path that init_from names here
    config = replace(run.config, init_from=None) if starts else run.config
    loaded = load_run_model(config, run.kind, run.label_names)
    if loaded.base_hash != run.about["base_hash"]:
        raise BaseMismatchError(
            f"the delta was made for another base model: the weights of {loaded.name!r} are not those that the run was "
            "trained on. Load the original model."
        )
    apply_start(run.config, loaded, run.path)
    return loaded


def merged_model(run: RunFolder) -> Any:
    """Return a run's tuned model in the base model's own architecture.

    Raises:
        ModelError: when the modules added by a method cannot be merged into it.
    """
    methods = run.config.methods()
    model = prepare_run_model(run.config, methods, base_model(run)).model
    run.delta.apply_(model)
    return methods.merge(model.eval()).eval()


def is_model_folder(path: str) -> bool:
    """Return whether a path is a model folder, and not a run's folder."""
    folder = Path(path).expanduser()
    return (folder / "config.json").is_file() and not (folder / CONFIG).is_file()
