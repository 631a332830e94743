"""`Inputs`: what runs start from; made anew for each run, or kept for the next that needs the same."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, TypeVar

from torch import Tensor

from childtuning.experiments.prediction import Reader
from childtuning.experiments.run_config import RunConfig
from childtuning.experiments.run_inputs import load_run_model, read_run_task
from childtuning.tasks import Elsewhere, Split, Task, load_elsewhere
from childtuning.training import LoadedModel, Method

_T = TypeVar("_T")
Scores = dict[str, Tensor]

_DATA = (
    "task",
    "task_kind",
    "train",
    "eval",
    "text",
    "text_pair",
    "label",
    "label_type",
    "data_dir",
    "train_limit",
    "eval_limit",
    "held_out",
    "data_seed",
)
_MODEL = ("model", "init_from")
# What scores depend on beside the data, the model, and the child that is asked for.
_PASS = ("seed", "always", "batch_size", "max_length", "precision")
# What of a child's configuration they do not depend on.
_NOT_SCORES = ("density", "mass", "granularity", "scope", "lowest", "rescale", "release_gradients")
_KEPT = {"task": 2, "elsewhere": 16, "encoded": 24, "model": 1, "scores": 1}  # entries of each sort


class Inputs:
    """What a run starts from.

    Args:
        keep: keep what the next run may need as well, so that runs on the same data, or of the same seed, read,
            tokenise, load and score once. It is never changed by a run, and makes no difference to its result.
    """

    def __init__(self, *, keep: bool = False) -> None:
        self._keep = keep
        self._kept: dict[str, OrderedDict[Any, Any]] = {sort: OrderedDict() for sort in _KEPT}

    def task(self, config: RunConfig) -> tuple[Task, Split | None]:
        """Return a run's examples, and those of training that it sets aside."""
        return self._once("task", _options(config, _DATA), lambda: read_run_task(config))

    def elsewhere(self, name: str, config: RunConfig, task: Task) -> Elsewhere:
        """Return examples of another task."""
        drawn = {"limit": config.eval_limit, "seed": config.data_seed}
        key = (name, config.data_dir, task.label_names, *drawn.values())
        return self._once(
            "elsewhere", key, lambda: load_elsewhere(name, task.label_names, config.data_dir, **drawn)
        )

    def encoded(self, config: RunConfig, reader: Reader, split: Split, where: str) -> Any:
        """Return examples as numbers; ``where`` says which they are."""
        key = (_options(config, (*_DATA, *_MODEL, "max_length")), where)
        return self._once("encoded", key, lambda: reader.encode(split, where))

    def model(self, config: RunConfig, task: Task) -> LoadedModel:
        """Return the base model with a new head, to be changed at will."""
        key = (_options(config, (*_MODEL, "seed")), task.kind, task.label_names)
        loaded = self._once("model", key, lambda: load_run_model(config, task.how, task.label_names))
        return replace(loaded, model=copy.deepcopy(loaded.model)) if self._keep else loaded

    def scores(self, config: RunConfig) -> Callable[[Callable[[], Scores]], Scores]:
        """Return what a trainer asks for scores: a function of the pass that finds them."""
        changed = tuple(m for m in config.methods().methods if type(m).prepare is not Method.prepare)
        child = {k: v for k, v in asdict(config.child()).items() if k not in _NOT_SCORES}
        key = (_options(config, (*_DATA, *_MODEL, *_PASS)), changed, tuple(child.items()))
        return lambda make_fn: self._once("scores", key, make_fn)

    def _once(self, sort: str, key: Any, make_fn: Callable[[], _T]) -> _T:
        if not self._keep:
            return make_fn()
        kept = self._kept[sort]
        if key not in kept:
            while len(kept) >= _KEPT[sort]:
                kept.popitem(last=False)  # before the new one is made: the two may be large
            kept[key] = make_fn()
        kept.move_to_end(key)
        return kept[key]


def _options(config: RunConfig, names: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(getattr(config, name) for name in names)
