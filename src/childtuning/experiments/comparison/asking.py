"""From what a user asks for to a `Comparison`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from childtuning.errors import ConfigError
from childtuning.experiments.comparison.design import Comparison, read_grid, read_methods, read_sizes
from childtuning.experiments.comparison.protocols import find_protocol, inference_splits

_METHODS = ("full", "child-f", "child-d")
_PATHS = ("train", "eval", "data_dir", "init_from")


def asked_for(
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
    """Put together a comparison.

    Where neither task nor file nor protocol is named, it is the stored one, with what is given in place of its own.

    Args:
        before: what the store is about already, if it is there.
        tasks, methods: texts in which commas part them.
        grid: ``NAME=VALUE,VALUE`` or ``METHOD:NAME=VALUE,VALUE``.
        protocol: its name.
        train_sizes: ``100,1000,all``.
        settings: other fields of ``Comparison``; those that are ``None`` are not given.
        options: of all runs, as ``RunConfig`` takes them.
        jobs: processes that will share the machine, for the number of threads.
        command: what was typed.
    Raises:
        ConfigError: nothing is asked for, or something that makes no run.
    """
    given = {name: value for name, value in (settings or {}).items() if value is not None}
    runs = _full_paths(options or {})
    anew = bool(tasks or protocol or "train" in runs)
    if not anew and before is None:
        raise ConfigError(
            "there is nothing to compare. Pass --task NAME, --train FILE and --eval FILE, or --protocol."
        )
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
        given["tasks"] = (Path(runs["train"]).name.split(".")[0],)
    if anew and "tasks" not in given:
        raise ConfigError(
            f"protocol {protocol!r} names no tasks of its own. Pass --task NAME, or --train and --eval."
        )
    if methods:
        given["methods"] = read_methods(methods)
    if train_sizes:
        given["train_sizes"] = read_sizes(train_sizes)
    if anew:
        given = {"methods": _METHODS, **given}
        given.setdefault("threads", before.threads if before else max(1, (os.cpu_count() or 1) // jobs))
    if "num_seeds" in given:  # fewer seeds than one tunes with are tuned with all of them
        given.setdefault(
            "tune_seeds", min(1 if anew or before is None else before.tune_seeds, given["num_seeds"])
        )
    if grid:
        own = given.get("methods") or (before.methods if before else ())
        given["grid"], given["grid_of"] = read_grid(grid, own)
    if anew:
        return Comparison(**given, protocol=protocol, options=runs, command=command)
    assert before is not None
    if runs:
        given["options"] = {**before.options, **runs}
    return replace(before, **given, command=command) if given else before


def _full_paths(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options whose paths hold from every folder."""
    full = dict(options)
    for name in _PATHS:
        if name in full:
            full[name] = str(Path(full[name]).expanduser().resolve())
    if "model" in full and Path(full["model"]).expanduser().is_dir():
        full["model"] = str(Path(full["model"]).expanduser().resolve())
    return full
