"""Layer 4: configure, execute, record, resume and reopen runs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from childtuning.runs.config import RunConfig
    from childtuning.runs.predict import FinishedRun
    from childtuning.runs.run import score_run, train_run, understand_run

__all__ = ["FinishedRun", "RunConfig", "score_run", "train_run", "understand_run"]
_HOMES = {
    "FinishedRun": "predict",
    "RunConfig": "config",
    "score_run": "run",
    "train_run": "run",
    "understand_run": "run",
}


def __getattr__(name: str) -> Any:
    """Import a name on first access, so that options can be read without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
