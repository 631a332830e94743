"""Layer 4: runs: configured, executed, recorded, resumed, and opened again."""

from childtuning.runs.config import RunConfig
from childtuning.runs.predict import FinishedRun
from childtuning.runs.run import score_run, train_run

__all__ = ["FinishedRun", "RunConfig", "score_run", "train_run"]
