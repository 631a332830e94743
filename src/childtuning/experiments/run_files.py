"""The files of a run's folder: their names, how they are written, and who may write where.

config.toml            the resolved options
labels.json            kind of task, label names, metrics, columns, the base model's hash
delta.json, delta.safetensors   the trained values
child.safetensors      which entries they are (fixed children)
tokenizer/             the tokenizer; image_processor/ where the examples are images
method/                what a method leaves for others (an adapter in PEFT's own format)
start/                 how the run it started from differs from the base model, a delta (--init-from)
log.jsonl              what was logged while training
tensorboard/           the same for TensorBoard (--report-to tensorboard)
metrics.json           the result; written last, so that it marks a finished run
checkpoints/           while the run is going on
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from childtuning.errors import ConfigError
from childtuning.experiments.run_config import RunConfig, read_toml
from childtuning.tasks import KINDS

CONFIG, LABELS, METRICS = "config.toml", "labels.json", "metrics.json"
METHOD_FILES, CHECKPOINTS, START, TENSORBOARD = "method", "checkpoints", "start", "tensorboard"
_OURS = (
    "log.jsonl",
    CONFIG,
    LABELS,
    METRICS,
    *sorted({kind.processor_folder for kind in KINDS.values()}),
    METHOD_FILES,
    START,
    TENSORBOARD,
    CHECKPOINTS,
    "child.safetensors",
    "delta.json",
    "delta.safetensors",
)
_NOT_IDENTITY = ("save_steps", "report_to")


def write_text(path: Path, text: str) -> None:
    """Write a file, complete or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, complete or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def check_output(folder: Path, config: RunConfig, *, overwrite: bool, resume: bool) -> None:
    """Make sure that a run may write to a folder; nothing is changed.

    Raises:
        ConfigError: it holds something that would be lost, or a run with other options is to be resumed.
    """
    if resume and overwrite:
        raise ConfigError("--resume goes on with a run and --overwrite removes it. Pass one of them.")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output {str(folder)!r} is a file. Pass a folder.")
    if not folder.is_dir() or not any(folder.iterdir()):
        if resume:
            raise ConfigError(f"there is nothing to resume in {str(folder)!r}. Leave out --resume to start.")
        return
    if _is_bare(folder) and not resume:
        return
    is_run = _is_run(folder)
    if resume:
        if not is_run:
            raise ConfigError(f"{str(folder)!r} is not a run: it has no {CONFIG}. Pass the run's folder.")
        _check_same(folder, config)
    elif not overwrite:
        raise ConfigError(
            f"output folder {str(folder)!r} is not empty. Pass --resume, --overwrite, or another folder."
        )
    elif not is_run:
        raise ConfigError(
            f"{str(folder)!r} holds files that are not a run's, so it is not overwritten. Pass another."
        )


def _is_bare(folder: Path) -> bool:
    """Whether all there is in a folder is the empty one that a run makes first."""
    return all(
        path.name == CHECKPOINTS and path.is_dir() and not any(path.iterdir()) for path in folder.iterdir()
    )


def _is_run(folder: Path) -> bool:
    try:
        RunConfig.from_options(read_toml(folder / CONFIG))
    except ConfigError:
        return False
    return True


def _check_same(folder: Path, config: RunConfig) -> None:
    before = RunConfig.from_options(read_toml(folder / CONFIG))
    for name in RunConfig.__dataclass_fields__:
        then, now = getattr(before, name), getattr(config, name)
        if then != now and name not in _NOT_IDENTITY:
            raise ConfigError(
                f"the run in {str(folder)!r} was started with {name}={then!r}, got {now!r}. "
                "Resume with the same options, or pass another output folder."
            )


def clear_run(folder: Path) -> None:
    """Remove a run's own files from its folder, and nothing else."""
    for name in (*_OURS, *(name + ".partial" for name in _OURS)):
        path = folder / name
        if path.is_symlink():
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()


def remove_empty(folder: Path) -> None:
    """Remove a run's folder that the trainer made and nothing was written to."""
    for path in (folder / CHECKPOINTS, folder):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that was written to its end; broken ones are left where they are."""
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
