"""Build a comparison from the user's settings and, optionally, one of the paper's named protocols."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from childtuning.compare.design import PAPER, Comparison, read_grid, read_methods, read_sizes
from childtuning.errors import ConfigError, did_you_mean
from childtuning.runs.config import name_of_data

_GLUE_SMALL = ("cola", "rte", "mrpc", "stsb")
_MAIN = ("full", "child-f", "child-d")
# The evaluation data of domain-transfer runs, as far as available: test splits, and MNLI's two dev splits.
_NLI = (
    ("mnli", ("dev_matched", "dev")),
    ("mnli", ("dev_mismatched", "dev_mismatched_1000_tokenized")),
    ("snli", ("test", "dev")),
    ("sick", ("test", "dev")),
    ("scitail", ("test", "dev")),
    ("qqp", ("dev",)),
)


@dataclass(frozen=True)
class Protocol:
    """A named protocol: defaults for the settings that the user leaves out.

    Attributes:
        summary: one line for listings.
        settings: fields of ``Comparison``.
        options: options of all runs; the paper's rate and epochs.
        scores_elsewhere: score every network on the other language-inference tasks of the data folder.
        overlaps: measure how far the children of different tasks overlap.
    """

    summary: str
    settings: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=lambda: PAPER)
    scores_elsewhere: bool = False
    overlaps: bool = False


PROTOCOLS: Mapping[str, Protocol] = {
    "paper": Protocol(
        "hyperparameters chosen by the reported examples, as in the paper: mean and best of the dev scores",
        {"selection": "reported"},
    ),
    "glue-small": Protocol(
        "the four small GLUE tasks: CoLA, RTE, MRPC, STS-B",
        {"tasks": _GLUE_SMALL, "methods": _MAIN, "grid": {"learning_rate": [2e-5, 4e-5, 1e-4]}},
    ),
    "low-resource": Protocol(
        "few training examples: 100, 300, 1,000",
        {"tasks": ("rte", "mrpc"), "methods": _MAIN, "train_sizes": (100, 300, 1000)},
    ),
    "domain-transfer": Protocol(
        "train on 5,000 examples of SNLI or MNLI, score on the other language-inference tasks",
        {"tasks": ("snli", "mnli"), "methods": _MAIN, "train_sizes": (5000,)},
        scores_elsewhere=True,
    ),
    "task-transfer": Protocol(
        "freeze each tuned body and train a new linear head on it for the other tasks",
        {"tasks": ("mrpc", "rte"), "methods": _MAIN, "transfer_to": ("mrpc", "rte", "cola", "stsb")},
    ),
    "ablation": Protocol(
        "children that are random, have the lowest Fisher information, or are all that remains of the network",
        {
            "tasks": ("rte", "mrpc"),
            "methods": ("full", "child-d", "child-random", "child-lowest", "child-pruned"),
        },
    ),
    "overlap": Protocol(
        "overlap of the children that different tasks choose",
        {"tasks": _GLUE_SMALL, "methods": ("child-d",), "num_seeds": 1},
        overlaps=True,
    ),
}


def find_protocol(name: str) -> Protocol:
    """Return a protocol by name.

    Raises:
        ConfigError: when there is no such protocol.
    """
    if name not in PROTOCOLS:
        raise ConfigError(f"there is no protocol {name!r}. {did_you_mean(name, PROTOCOLS)}")
    return PROTOCOLS[name]


def inference_splits(data_dir: str | Path) -> tuple[str, ...]:
    """Return the language-inference splits in a data folder, as values of ``elsewhere``.

    Raises:
        ConfigError: when there are none.
    """
    from childtuning.tasks.task_folders import file_of

    found = []
    for task, splits in _NLI:
        folder = Path(data_dir).expanduser() / task
        there = [split for split in splits if folder.is_dir() and file_of(folder, split)]
        found += [f"{task}/{there[0]}"] if there else []
    if not found:
        raise ConfigError(
            f"data_dir {str(data_dir)!r} contains none of mnli, snli, sick, scitail, qqp. Pass another."
        )
    return tuple(dict.fromkeys(found))


_METHODS = ("full", "child-f", "child-d")
_PATHS = ("train", "eval", "data_dir", "init_from")


def read_comparison(
    before: Comparison | None,
    *,
    tasks: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    grid: Sequence[str] = (),
    protocol: str | None = None,
    train_sizes: str | None = None,
    settings: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    jobs: int = 1,
    command: str | None = None,
) -> Comparison:
    """Build a comparison from settings.

    If no task, file or protocol is named, it is the stored comparison, updated with the given settings.

    Args:
        before: the comparison in the store, if it exists.
        tasks, methods: texts with comma-separated names.
        grid: ``NAME=VALUE,VALUE`` or ``METHOD:NAME=VALUE,VALUE``.
        protocol: the name of a protocol.
        train_sizes: ``100,1000,all``.
        settings: other fields of ``Comparison``; ``None`` means not given.
        options: options of all runs, as in ``RunConfig``.
        jobs: the number of processes that share the machine; sets the default number of threads.
        command: the command as typed.
    Raises:
        ConfigError: when there is nothing to compare, or the settings do not make valid runs.
    """
    given = {name: value for name, value in (settings or {}).items() if value is not None}
    runs = _full_paths(options or {})
    anew = bool(tasks or protocol or "train" in runs)
    if not anew and before is None:
        raise ConfigError("there is nothing to compare. Pass --task NAME, --train FILE, or --protocol.")
    if (tasks or protocol not in (None, "paper")) and "train" in runs:
        raise ConfigError("tasks by name and --train/--eval exclude each other. Pass one of them.")
    known = find_protocol(protocol) if protocol else None
    if known is not None:
        given = {**known.settings, **given}
        runs = {**known.options, **runs}
        if known.scores_elsewhere and "elsewhere" not in runs:
            if "data_dir" not in runs:
                raise ConfigError(f"protocol {protocol!r} needs its tasks' files. Pass --data-dir DIR.")
            runs["elsewhere"] = inference_splits(runs["data_dir"])
        given["overlaps"] = known.overlaps
        given["keep"] = given.get("keep", False) or known.overlaps
    if tasks:
        given["tasks"] = tuple(word.strip() for text in tasks for word in text.split(","))
    elif "train" in runs:
        given["tasks"] = (name_of_data(runs["train"]),)
    if anew and "tasks" not in given:
        raise ConfigError(
            f"protocol {protocol!r} names no tasks of its own. Pass --task NAME, or --train FILE."
        )
    if methods:
        given["methods"] = read_methods(methods)
    if train_sizes:
        given["train_sizes"] = read_sizes(train_sizes)
    if anew:
        given = {"methods": _METHODS, **given}
        given.setdefault("threads", before.threads if before else max(1, (os.cpu_count() or 1) // jobs))
    if "num_seeds" in given:  # with fewer seeds than tune_seeds, all are used for tuning
        given.setdefault(
            "tune_seeds", min(1 if anew or before is None else before.tune_seeds, given["num_seeds"])
        )
    if grid:
        own = given.get("methods") or (before.methods if before else ())
        given["grid"], given["grid_of"] = read_grid(grid, own)
        for name in given["grid"]:
            if name in (options or {}):
                raise ConfigError(f"the grid and an option both say {name!r}. Leave one of them out.")
    if anew:
        return Comparison(**given, protocol=protocol, options=runs, command=command)
    assert before is not None
    if runs:
        given["options"] = {**before.options, **runs}
    return replace(before, **given, command=command) if given else before


def _full_paths(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with absolute paths."""
    full = dict(options)
    for name in _PATHS:
        if name in full:
            full[name] = str(Path(full[name]).expanduser().resolve())
    if "model" in full and Path(full["model"]).expanduser().is_dir():
        full["model"] = str(Path(full["model"]).expanduser().resolve())
    return full
