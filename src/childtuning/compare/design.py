"""`Comparison`: its methods, tasks, seeds and hyperparameters, and the runs they result in."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from childtuning.compare.records import Group, Record
from childtuning.errors import ConfigError
from childtuning.methods import Combination
from childtuning.options import options_of
from childtuning.runs.config import HELD_OUT, Data, RunConfig, option_of_text

Grid = Mapping[str, Sequence[Any]]
_SHORT = {"lr": "learning_rate"}
_OF_CHILDREN = (
    "density",
    "mass",
    "granularity",
    "budget",
    "scope",
    "estimator",
    "fisher_labels",
    "fisher_examples",
    "rescale",
)
_FIXED: dict[str, str] = {  # options that a grid cannot contain -> the remedy
    "seed": "Pass --seeds.",
    "method": "Pass --methods.",
    "task": "Pass --task.",
    "train_limit": "Pass --train-sizes.",
    "train": "Compare one data set at a time.",
    "eval": "Compare one data set at a time.",
    "data_dir": "Compare one data set at a time.",
}
_OF_ALL = (*options_of(Data), "report_to")  # nor these, which earlier versions allowed in part
SELECTIONS = ("held-out", "reported")
_NOT_IDENTITY = ("data_dir", "save_steps", "report_to")
PAPER = {"learning_rate": 2e-5, "epochs": 3.0}
"""The paper's training, which every run had by default before rates and epochs were chosen by the run itself."""
_DEFAULTS = {option.name: option.default for option in fields(RunConfig)} | PAPER


@dataclass(frozen=True)
class Comparison:
    """A comparison of methods on tasks over seeds, each method with its best hyperparameters.

    Every set of hyperparameters is tried with the first ``tune_seeds`` seeds; the best set of each method, task and
    size is run with all seeds. If there is anything to choose, each run holds out a tenth of its training examples, and
    the choice is based on these, not on the reported examples, unless ``selection`` is ``reported``.

    Attributes:
        tasks: names; the name of the data alone (``name_of_data``) if ``options`` name files.
        methods: as typed: ``child-d+r3f:0.7``. A method with other options of its own is another entry, with a label:
            ``child-d@columns``.
        num_seeds: runs have the seeds 0 … num_seeds − 1.
        tune_seeds: the number of seeds that every set of hyperparameters is tried with.
        grid: option of a run -> values to try. Options of children are ignored for methods without a child.
        grid_of: method -> its own grid, whose values replace those of ``grid``.
        train_sizes: numbers of training examples; ``None`` is all.
        selection: choose by the ``held-out`` examples, or by the ``reported`` ones, as the paper does.
        transfer_to: tasks for which a new head is then trained on every tuned network, with its body frozen.
        overlaps: measure how far the children of different tasks overlap.
        baseline: the method that the others are compared with; ``None``: the first.
        protocol: the name of its protocol, if any.
        options: options of all runs, as in ``RunConfig``.
        threads: processor threads per run; results depend on the number in the last bits.
        keep: whether to keep the runs' folders after recording.
        command: the command as typed.
    Raises:
        ConfigError: when the settings do not make valid runs.
    """

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    num_seeds: int = 5
    tune_seeds: int = 1
    grid: Grid = field(default_factory=dict)
    grid_of: Mapping[str, Grid] = field(default_factory=dict)
    train_sizes: tuple[int | None, ...] = (None,)
    selection: Literal["held-out", "reported"] = "held-out"
    transfer_to: tuple[str, ...] = ()
    overlaps: bool = False
    baseline: str | None = None
    protocol: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    threads: int = 1
    keep: bool = False
    command: str | None = None

    def __post_init__(self) -> None:
        for name in ("tasks", "methods", "train_sizes"):
            values = getattr(self, name)
            if not values:
                raise ConfigError(f"a comparison needs {name}, got none. Pass --{name.replace('_', '-')}.")
            repeated = {value for value in values if values.count(value) > 1}
            if repeated:
                raise ConfigError(f"{name} has {repeated.pop()!r} twice. Pass it once.")
        if not 1 <= self.tune_seeds <= self.num_seeds:
            raise ConfigError(
                f"tune_seeds must be between 1 and the {self.num_seeds} seeds, got {self.tune_seeds}."
            )
        if self.selection not in SELECTIONS:
            raise ConfigError(f"selection must be {' or '.join(SELECTIONS)}, got {self.selection!r}.")
        if self.selection == "held-out" and self.options.get("held_out") == 0 and self.chooses:
            raise ConfigError(
                "hyperparameters are chosen by held-out examples, got held_out=0. Leave it out, or pass --selection "
                "reported."
            )
        if self.baseline is not None and self.baseline not in self.methods:
            raise ConfigError(
                f"baseline {self.baseline!r} is not among the methods {', '.join(self.methods)}. Add it."
            )
        for method in self.grid_of:
            if method not in self.methods:
                raise ConfigError(f"the grid names {method!r}, which is not compared. Add it to --methods.")
        for grid in (self.grid, *self.grid_of.values()):
            for name, values in grid.items():
                if name in _FIXED:
                    raise ConfigError(f"the grid cannot hold {name!r}. {_FIXED[name]}")
                if not values:
                    raise ConfigError(f"the grid has no values for {name!r}. Pass {name}=VALUE,VALUE.")
        for method, other in itertools.combinations(self.methods, 2):
            if unlabelled(method) == unlabelled(other) and self.points(method) == self.points(other):
                name = other if "@" in other else method
                raise ConfigError(
                    f"methods {method!r} and {other!r} are the same runs. Pass --grid {name}:NAME=VALUE, or leave "
                    "one of them out."
                )
        if not any(combination_of(method).takes_density for method in self.methods):
            asked = {**self.options, **self.grid}
            for name in _OF_CHILDREN:
                if name in asked:
                    raise ConfigError(f"none of the methods chooses a child, got {name}. Leave it out.")
        assert self.first_runs  # checks every configuration that will be tried

    @property
    def against(self) -> str:
        """The method that the others are compared with."""
        return self.baseline or self.methods[0]

    @property
    def chooses(self) -> bool:
        """Whether any method has more than one set of hyperparameters."""
        return any(len(self.points(method)) > 1 for method in self.methods)

    @property
    def num_comparisons(self) -> int:
        """The number of tests on single tasks: every method but the baseline, at every size, task and start."""
        places = len(self.tasks) + sum(task != to for task in self.tasks for to in self.transfer_to)
        return (len(self.methods) - 1) * places * len(self.train_sizes)

    @property
    def seeds_to_tune(self) -> range:
        """The seeds with which every set of hyperparameters is tried."""
        return range(self.tune_seeds)

    def points(self, method: str) -> list[dict[str, Any]]:
        """Return the sets of hyperparameters to try for a method."""
        grid = {**self.grid, **self.grid_of.get(method, {})}
        if not combination_of(method).takes_density:
            grid = {name: values for name, values in grid.items() if name not in _OF_CHILDREN}
        return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]

    def groups(self) -> Iterator[Group]:
        """Yield the groups of runs that are tuned, task by task."""
        for task in self.tasks:
            for size in self.train_sizes:
                for method in self.methods:
                    yield Group(task, method, size)

    @cached_property
    def first_runs(self) -> tuple[Record, ...]:
        """The runs that choose hyperparameters, ordered by task and seed."""
        return tuple(
            self.run(Group(task, method, size), seed, point)
            for task in self.tasks
            for size in self.train_sizes
            for seed in self.seeds_to_tune
            for method in self.methods
            for point in self.points(method)
        )

    @cached_property
    def _runs(self) -> dict[Any, Record]:
        return {}

    def run(self, group: Group, seed: int, point: Mapping[str, Any]) -> Record:
        """Return one run of this comparison, as planned.

        Raises:
            ConfigError: when its options cannot be combined.
        """
        key = (group, seed, tuple(point.items()))
        if key not in self._runs:
            self._runs[key] = self._run(group, seed, point)
        return self._runs[key]

    def _run(self, group: Group, seed: int, point: Mapping[str, Any]) -> Record:
        options = {**self.options, **point, "method": unlabelled(group.method), "seed": seed}
        if "train" not in options:
            options["task"] = group.task
        if group.train_size is not None:
            options["train_limit"] = group.train_size
        if self.selection == "held-out" and self.chooses:
            options.setdefault("held_out", HELD_OUT)
        if not combination_of(group.method).takes_density:
            options = {name: value for name, value in options.items() if name not in _OF_CHILDREN}
        return self._record(group, seed, point, options)

    def transfer_run(self, source: Record, target: str, folder: Path) -> Record:
        """Return the run that trains a new head for another task on a finished run's network, with its body frozen.

        The head is trained on as many examples as the network.

        Args:
            source: the finished run.
            target: the other task.
            folder: the folder of the source's files.
        """
        options = {
            name: value
            for name, value in source.config.items()
            if name not in (*_OF_CHILDREN, "eligible", "held_out", "elsewhere")
        }
        options |= {"task": target, "method": "head", "init_from": str(folder), "learning_rate": _HEAD_RATE}
        group = Group(target, source.group.method, source.group.train_size, start=source.group.task)
        return self._record(group, source.seed, source.point, options, start=source.id)

    def _record(
        self,
        group: Group,
        seed: int,
        point: Mapping[str, Any],
        options: Mapping[str, Any],
        start: str | None = None,
    ) -> Record:
        config = RunConfig.from_options(options)
        given = {name: value for name, value in asdict(config).items() if value is not None}
        # Options with default values are left out, so that ids stay the same when later versions add options.
        identity = {n: v for n, v in given.items() if n not in _NOT_IDENTITY and v != _DEFAULTS[n]}
        if config.chooses_checkpoint and config.save_steps is not None:  # the steps at which it is chosen
            identity["save_steps"] = config.save_steps
        identity |= {"threads": self.threads, **({"init_from": start} if start else {})}
        if group.method != unlabelled(group.method):  # entries of the same method share no run
            identity["label"] = group.method
        text = json.dumps(identity, sort_keys=True)
        return Record(hashlib.sha256(text.encode()).hexdigest()[:16], group, seed, dict(point), given)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready fields."""
        return {**asdict(self), "defaults": "auto"}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Return the comparison whose fields ``to_dict`` returned."""
        values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in content.items()}
        if "defaults" not in values:
            values["options"] = {**PAPER, **values.get("options", {})}
        values.pop("defaults", None)
        return cls(**values)


_HEAD_RATE = 1e-3  # a linear head on a frozen body learns slowly at the rates for full networks


def unlabelled(method: str) -> str:
    """Return a method without the label that tells two entries of the same method apart.

    Example:
        >>> unlabelled("child-d@columns"), unlabelled("child-d")
        ('child-d', 'child-d')
    """
    return method.partition("@")[0]


def combination_of(method: str) -> Combination:
    """Return the methods that an entry of a comparison names.

    Raises:
        ConfigError: for an unknown method or option, or methods that cannot be combined.
    """
    return Combination.parse(unlabelled(method))


def read_methods(texts: Sequence[str]) -> tuple[str, ...]:
    """Read methods separated by commas: ``full,smart:weight=0.5,steps=1,child-d@columns`` are three.

    Raises:
        ConfigError: when there is no such method, it has no such option, or a label is not a word.
    """
    methods: list[str] = []
    for text in texts:
        words: list[str] = []
        for piece in text.split(","):
            name, equals, _ = piece.partition("=")
            if words and equals and ":" not in name:  # another option of the previous method
                words[-1] += "," + piece
            else:
                words.append(piece)
        methods += [word.strip() for word in words]
    for method in methods:
        combination_of(method)
        _, at, label = method.partition("@")
        if at and not re.fullmatch(r"[\w.-]+", label):
            raise ConfigError(f"a label is letters, digits and '-', got {method!r}. Write child-d@columns.")
    return tuple(methods)


def read_grid(texts: Sequence[str], methods: Sequence[str]) -> tuple[dict[str, list[Any]], dict[str, Grid]]:
    """Read the values of hyperparameters: ``lr=2e-5,4e-5`` for all methods, ``lora:lr=1e-3`` for one.

    Returns:
        the grid of all methods, and method -> its own grid.
    Raises:
        ConfigError: when there is no such option, or a value has the wrong type.
    """
    grid: dict[str, list[Any]] = {}
    grid_of: dict[str, dict[str, list[Any]]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        method = max((m for m in methods if text.startswith(m + ":")), key=len, default=None)
        if method is not None:
            name, equals, values = text[len(method) + 1 :].partition("=")
        if ":" in name:
            raise ConfigError(
                f"the grid names {name.rpartition(':')[0]!r}, which is not compared. Add it to --methods."
            )
        name = name.strip().replace("-", "_")
        name = _SHORT.get(name, name)
        if not equals or not values:
            raise ConfigError(f"the grid takes NAME=VALUE,VALUE or METHOD:NAME=VALUE, got {text!r}.")
        if name in _OF_ALL and name not in _FIXED:
            raise ConfigError(f"the grid cannot hold {name!r}. Pass it as an option of all runs.")
        if method is not None and name in _OF_CHILDREN and not combination_of(method).takes_density:
            raise ConfigError(f"method {method!r} chooses no child, got {name} in its grid. Leave it out.")
        into = grid if method is None else grid_of.setdefault(method, {})
        if name in into:
            raise ConfigError(f"the grid has {name!r} twice. Put all its values after one {name}=.")
        into[name] = list(dict.fromkeys(option_of_text(name, value.strip()) for value in values.split(",")))
    return grid, dict(grid_of)


def read_sizes(text: str) -> tuple[int | None, ...]:
    """Read training sizes: ``100,1000,all``.

    Raises:
        ConfigError: when a size is not a number above 0.
    """
    sizes: list[int | None] = []
    for word in text.split(","):
        word = word.strip().replace("_", "")
        if word != "all" and not (word.isdigit() and int(word) > 0):
            raise ConfigError(f"train sizes are numbers above 0, or all, got {word!r}.")
        sizes.append(None if word == "all" else int(word))
    return tuple(sizes)
