"""Layer 4: configure, execute, record, resume and reopen runs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from childtuning.runs.begin import understand_run
    from childtuning.runs.config import RunConfig
    from childtuning.runs.predict import FinishedRun
    from childtuning.runs.run import train_run
    from childtuning.runs.score import score_run

__all__ = ["FinishedRun", "RunConfig", "load", "score_run", "train_run", "understand_run"]
_HOMES = {
    "FinishedRun": "predict",
    "RunConfig": "config",
    "score_run": "score",
    "train_run": "run",
    "understand_run": "begin",
}


def load(
    path: Any, *, model: Any = None, progress: bool = False, tell: Any = lambda line: None
) -> FinishedRun:
    """Open the folder of a finished run, or one that ``ChildTrainer`` saved.

    Args:
        path: the folder, or ``hf://OWNER/NAME``, also with ``@REVISION``, of the Hugging Face hub.
        model: the base model, if it is no longer where the run says: a folder or a hub name; for a folder of
            ``ChildTrainer`` also a model, which is not changed.
        progress: draw bars on standard error.
        tell: called with lines for the user.
    Returns:
        the run, with ``predict``, ``predict_proba``, ``evaluate``, ``merge`` and ``model``.
    Raises:
        ConfigError: when the folder is neither.
        CorruptFileError: when its files are damaged.
    """
    from pathlib import Path

    from childtuning.runs.folder import CONFIG

    folder = Path(path).expanduser()
    if str(path).startswith("hf:/"):
        from childtuning.runs.hub import local_folder

        folder = local_folder(path)
    if (folder / "delta.json").is_file() and not (folder / CONFIG).is_file():
        from childtuning.runs.trainer_folder import TrainerFolder

        return TrainerFolder(folder, model=model, progress=progress, tell=tell)
    from childtuning.runs.predict import FinishedRun

    return FinishedRun(folder, model=model, progress=progress, tell=tell)


def __getattr__(name: str) -> Any:
    """Import a name on first access, so that options can be read without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
