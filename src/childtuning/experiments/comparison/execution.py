"""Execute one run of a comparison, and keep of it what is worth recording."""

from __future__ import annotations

import errno
import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from childtuning.delta import Delta
from childtuning.experiments.comparison.records import Record
from childtuning.experiments.run_config import RunConfig
from childtuning.experiments.run_files import CONFIG, TENSORBOARD
from childtuning.experiments.run_training import train_run
from childtuning.experiments.shared_inputs import Inputs

_OUR_SURROUNDINGS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # no other run would fare better


def execute(run: Record, folder: Path, inputs: Inputs, *, keep: bool) -> Record:
    """Train, measure, and return the run with what came of it; an error becomes part of the record.

    A run that was killed goes on from its last checkpoint.

    Args:
        run: what to do.
        folder: its own folder.
        inputs: what it shares with the runs before it.
        keep: leave the folder behind; else it is removed once everything worth recording has been read.
    Raises:
        OSError: the disk is full or cannot be written to.
    """
    import torch

    start = time.perf_counter()
    try:
        config = RunConfig.from_options(run.config)
        result = train_run(config, folder, resume=_is_begun(folder), inputs=inputs)
        done = replace(
            run,
            state="done",
            result=_plain(result.to_dict() | {"output": str(folder) if keep else None}),
            curve=_curve(folder / "log.jsonl"),
            parts=_parts(folder),
        )
    except OSError as fault:
        if fault.errno in _OUR_SURROUNDINGS:
            raise
        done = replace(run, state="failed", error=_one_line(fault))
    except Exception as fault:
        done = replace(run, state="failed", error=_one_line(fault))
        if isinstance(fault, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
    if not (keep and done.state == "done"):
        _keep_board(folder, run.id)
        shutil.rmtree(folder, ignore_errors=True)
    return replace(done, seconds=time.perf_counter() - start)


def _keep_board(folder: Path, name: str) -> None:
    """Put TensorBoard's files aside, which are to outlive the run's folder."""
    if (folder / TENSORBOARD).is_dir():
        boards = folder.parent.parent / TENSORBOARD
        boards.mkdir(exist_ok=True)
        shutil.rmtree(boards / name, ignore_errors=True)
        (folder / TENSORBOARD).rename(boards / name)


def _is_begun(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def _one_line(fault: Exception) -> str:
    return f"{type(fault).__name__}: {' '.join(str(fault).split())}"[:1000]


def _curve(path: Path) -> list[dict[str, Any]]:
    """Return what was logged while training, without what is the same for every run."""
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        {name: line[name] for name in ("step", "loss", "grad_norm", "learning_rate") if name in line}
        for line in map(_plain, lines)
        if "loss" in line
    ]


def _parts(folder: Path) -> dict[str, tuple[int, int]]:
    """Return by parameter how many entries were trained, and how many it has."""
    parts = Delta.load(folder).parts
    return {
        name: (part.num_trained, math.prod(part.shape)) for name, part in parts.items() if part.num_trained
    }


def _plain(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content with None for numbers that are not finite, which JSON does not have."""
    return {name: _finite(value) for name, value in content.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return _plain(value) if isinstance(value, Mapping) else value
